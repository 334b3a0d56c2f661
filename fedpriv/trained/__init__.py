"""After training: the ready module of a run, its scores and predictions, and its export with a model card."""
