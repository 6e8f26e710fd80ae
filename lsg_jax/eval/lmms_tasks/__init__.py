"""Tasks for lmms-eval, for its `--include_path`: the folder of this file."""
