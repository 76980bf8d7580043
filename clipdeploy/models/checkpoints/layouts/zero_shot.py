"""A zero-shot classifier, as :mod:`clipdeploy.models.clip.zero_shot` writes it."""

from clipdeploy.models.checkpoints.layouts.layout import Layout, rules

__all__ = ["ZERO_SHOT"]

ZERO_SHOT = Layout(
    name="zero-shot",
    # Another name than in timm's layout, which fits the other tensors.
    anchor="patches.weight",
    also=("embed.weight",),
    rules=rules(
        (r"patches\.weight", "patch_embed.proj.weight"),
        (r"(cls_token|pos_embed|(norm_pre|norm|embed|head|blocks\.\d+\..*)\.(weight|bias))", r"\1"),
    ),
    # In the file's metadata.
    gelu=None,
    eps=(1e-5, 1e-5),
)
