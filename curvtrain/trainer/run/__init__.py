"""The run itself: its layout, its compiled programs, its step and its loop."""
