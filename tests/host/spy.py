"""Looking at a site from outside, beside whatever edits it."""

from __future__ import annotations


class Spy:
    """Sees from outside what a site puts out, chunk by chunk, and under which uuid and at which place it was run."""

    def __init__(self, inside, site):
        self.chunks, self.site, self.inside = [], site, inside
        self.hooked = inside.pack_module("difflens_core.activations").edit_site
        self.sites = inside.pack_module("nodes.host.sites")

    def on(self, model):
        """A clone of the MODEL with the spy: it sees what edits before it in the graph have changed, none behind it."""
        clone = model.clone()
        clone.add_wrapper_with_key(
            self.inside.comfy.patcher_extension.WrappersMP.APPLY_MODEL, str(id(self)), self.watch
        )
        return clone

    def watch(self, executor, x, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "sigmas" in a)
        network, found = executor.class_obj.diffusion_model, []
        site = self.sites.run_name(network, self.site)
        picture = self.sites.Picture(network, site, x)
        with self.hooked(network, site, lambda h: found.append(h.clone()) or h, picture):
            out = executor(x, *args, **kwargs)
        told = zip(options["uuids"], options["cond_or_uncond"], found[0].chunk(len(options["uuids"])), strict=True)
        self.chunks += told
        return out
