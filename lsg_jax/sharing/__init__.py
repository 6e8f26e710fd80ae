"""Gates as a repository on the Hugging Face Hub: what it holds, its model card, and the upload."""
