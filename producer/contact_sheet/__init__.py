"""The contact sheet: a submission's results before and after, the worst first."""
