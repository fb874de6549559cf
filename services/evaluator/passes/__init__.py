"""What an evaluation measures beside the predictions, where it is asked for; most of it needs the model. A pass is a
constructor and a `run` that yields (name, value): metrics of services/evaluator/metrics. What it did, and figures that
rank nothing, stand in `detail` afterwards, for the evaluation's result."""
