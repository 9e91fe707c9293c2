"""The web page of `diffusers-ext app`: one file a tab. The folder is also a complete Hugging Face Space."""
