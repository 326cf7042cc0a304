"""Models that ComfyUI does not load by itself, as its own kinds: networks on pixels, and classifiers."""
