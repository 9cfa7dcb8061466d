"""What of a program may differ from the one that wrote a checkpoint: the one list, which README shows and a test walks.

What may change counts from the first step after the resume. What has to stay raises `trainer.Mismatch`, which names
every difference, before anything is trained or written.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the list.

    Attributes:
      names: of arguments, as their owner spells them.
      may_change: whether they may.
      remark: which part of them, or how it is meant; empty where the names say it.
    """

    names: tuple[str, ...]
    may_change: bool
    remark: str = ""


CONFIG = (
    Rule(("steps",), True, "a run that is over goes on when it has more"),
    Rule(("mesh", "sharding"), True, "and the number of processes, where all read the data at the same position"),
    Rule(("accumulate",), True, "BatchNorm sees other micro-batches then"),
    Rule(("ema",), True, "its decay"),
    Rule(("ema",), False, "whether there is one"),
    Rule(("eval_batch_size",), True, "a model that draws random numbers in evaluation draws others"),
    Rule(("save_every", "eval_every", "log_every"), True),
    Rule(("keep_latest", "keep_best", "best_metric", "best_mode"), True),
    Rule(("nonfinite", "max_nonfinite"), True),
    Rule(("writers", "progress", "compilation_cache"), True),
    Rule(("workdir",), True, "the folder may be moved"),
    Rule(("seed", "batch_size"), False),
)
TRAINER = (
    Rule(("optimizer",), True, "its numbers and schedules, a schedule in place of a number, a number in place of one"),
    Rule(("optimizer",), False, "which arrays its state has"),
    Rule(("curvature",), True, "options that leave shapes as they are"),
    Rule(("curvature",), False, "the estimator's class, and which arrays it maintains"),
    Rule(("schedule",), True, "where there is an estimator"),
    Rule(("train_data",), True, "its values beyond the first batch, which nobody compares"),
    Rule(("train_data",), False, "the first batch, and of arrays the number of examples"),
    Rule(("eval_data", "eval_params"), True),
    Rule(("mc_samples", "predictive_samples"), True),
    Rule(("hooks",), True, "the memory of a hook goes to the first of its class"),
    Rule(("trainable",), False, "which parameters are trained"),
)
SUBCLASS = (
    Rule(("loss", "predict", "metrics"), True, "code is not compared"),
    Rule(("build_model",), True, "whatever leaves the variables' names, shapes and dtypes as they are"),
    Rule(("build_model",), False, "names, shapes and dtypes of variables"),
    Rule(("the name of the class",), False),
)
OWNERS = {"TrainerConfig": CONFIG, "Trainer": TRAINER, "the Trainer's subclass": SUBCLASS}


def as_text() -> str:
    """The list in Markdown."""
    head = ("| of | may change at a resume | has to stay |", "|---|---|---|")
    chosen = lambda rules, may_change: _joined([rule for rule in rules if rule.may_change == may_change])
    rows = [f"| {owner} | {chosen(rules, True)} | {chosen(rules, False)} |" for owner, rules in OWNERS.items()]
    return "\n".join([*head, *rows]) + "\n"


def _joined(rules: Sequence[Rule]) -> str:
    shown = lambda name: name if " " in name else f"`{name}`"
    names = lambda rule: ", ".join(map(shown, rule.names))
    return "; ".join(f"{names(rule)} ({rule.remark})" if rule.remark else names(rule) for rule in rules)
