"""Find, measure and turn down what makes a diffusion model's pictures biased. Works without ComfyUI."""
