"""The embedded model: a small LLaVA trained on drawn scenes, its questions and its weights."""
