"""Tasks for lmms-eval: pass the folder of this file as `--include_path`."""
