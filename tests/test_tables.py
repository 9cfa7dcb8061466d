"""Text for people: columns that line up."""

from curvtrain._text import table


def test_columns_to_the_left_and_to_the_right():
    rows = [("layer", "kind", "bytes"), ("a", "Linear", "7"), ("total", "", "1,000")]
    assert table(rows, left=2).splitlines() == [
        "layer  kind    bytes",
        "a      Linear      7",
        "total          1,000",
    ]
    assert table(rows, left=3).splitlines()[1] == "a      Linear  7"  # nothing after the last word
