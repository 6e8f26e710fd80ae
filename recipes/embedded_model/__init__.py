"""How the embedded model was made: a small LLaVA with V-sinks, trained from scratch on drawn scenes.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m recipes.embedded_model OUT

1. The vision tower is trained to say what is in each patch, and to store a summary of the scene in V-sinks (`tower.py`).
2. The projector is aligned with the word embeddings of the language model (`alignment.py`).
3. Projector and language model are trained on a curriculum of six lessons with the tower frozen (`conversations.py`,
   `configs/embedded.toml`).

Finished parts are kept: the same command resumes after a stop. OUT/checkpoint is what the package ships. `--from CHECKPOINT`
takes the vision tower and the tokenizer of an earlier model. This folder is not part of the installed package.
"""
