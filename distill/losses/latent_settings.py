"""[latent]: how a latent-diffusion network becomes a depth network; implemented in distill.training.latent.

"FiffDepth" is its paper; "Marigold" and "GenPercept" are their released training configurations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from distill.core.settings import above, below, raise_faults, unknown_words

STEPS = 1000
"""DDPM's noise levels, 0 to 999."""
_NEUTRAL = ("cache", "cache_folder", "watch_prior")
"""Settings that change no number of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSettings:
    """What a network of latents (student.network = "one_step_unet") learns. The defaults are FiffDepth's."""

    method: Literal["feed_forward", "denoise"] = "feed_forward"
    """"feed_forward": one pass of the network turns the image's latents into the map's (FiffDepth, GenPercept);
    "denoise": it denoises the map's latents, given the image's, in several steps (Marigold)."""
    timestep: int = 0
    """The step index given to the one pass. FiffDepth: 0. GenPercept is used with 1."""
    random_timestep: bool = False
    """Draw the index for every image, 0 to 999. GenPercept: true."""
    negated: bool = False
    """The network's output is minus the map's latents, as in v-prediction without any signal. GenPercept: true; the
    genpercept teacher reads networks trained so, the fiffdepth teacher the others."""
    distance: Literal["mae", "mse"] = "mae"
    """Between latents: mean absolute or squared difference. FiffDepth: mae; GenPercept: mse. "denoise" uses mse, as
    Marigold does."""
    distance_weight: float = 1.0
    """lambda_MAE. FiffDepth: 1. 0 where only images are compared."""
    gradient: float = 0.5
    """lambda_GM, the weight of gradient matching between latents. FiffDepth: 0.5."""
    gradient_scales: int = 1
    """Scales of gradient matching. FiffDepth's Eq. 6 has one; MiDaS, which it cites, four; inferred: 1."""
    trajectory: float = 0.2
    """lambda_k, the weight of keeping the diffusion trajectory: the network also denoises blended latents. FiffDepth:
    0.2; 0 = off. Its Eq. 3 has a squared norm; inferred: a mean, like the other losses."""
    blend: float = 0.5
    """gamma: the image's share in the blended latents, the rest is the depth's; in [0, 1]. FiffDepth: 0.5; 1 = purely
    image latents."""
    blend_depth: Literal["truth", "predicted"] = "truth"
    """Which depth latents are blended in: the label's, or the network's own (without gradient). FiffDepth does not say;
    ours."""
    first_index: int = 1
    """The lowest noise level of the trajectory, up to 999. FiffDepth: t in 1..T; inferred: index 0 is left out, for
    it would be the feed-forward pass's own."""
    pseudo: Literal["filter", "direct", "off"] = "filter"
    """How pseudo-labels teach: "filter" after another pass, which may remove detail; "direct" as ground truth does;
    "off" not at all. FiffDepth: filter."""
    filter_timestep: int = -1
    """The step index of the filter's pass. FiffDepth: -1, which a UNet accepts."""
    filter_gradient: bool = True
    """The filter's loss also has a gradient in the map that it filters. Implied by FiffDepth's aim; inferred."""
    pseudo_shape: Literal["inverted", "flipped"] = "inverted"
    """How a pseudo-label of disparity is converted where depth is learnt (and vice versa): "inverted" takes 1 / label,
    with the shift set by `reach`; "flipped" its negative. FiffDepth does not say; ours. With train.kind =
    "affine_disparity" neither is needed."""
    reach: float = 50.0
    """With "inverted": the ratio of the far end's depth to the near end's (both are quantiles). Ours."""
    image_mse: float = 0.0
    """Weight of the mean squared difference of maps in [-1, 1], after the VAE's decoder or the DPT head. GenPercept:
    1."""
    image_ssi: float = 0.0
    """Weight of their L1 after a least-squares fit of scale and shift. GenPercept: 0.5."""
    image_gradient: float = 0.0
    """Weight of their gradient matching at one scale. GenPercept: 2."""
    quantile: float = 0.02
    """This and 1 minus this quantile of a map become -1 and 1, in [0, 0.5). Marigold, whose encoding FiffDepth
    follows: 0.02. GenPercept's disparity: 0 in effect, though its configuration says 0.02."""
    noise_strength: float = 0.9
    """"denoise": strength of multi-resolution noise; 0 = plain noise. Marigold: 0.9."""
    noise_annealed: bool = True
    """"denoise": the strength falls to 0 with the noise level. Marigold: true."""
    zero_snr: bool = True
    """"denoise": the noise schedule is rescaled so that its last level has no signal. Marigold v1-1: true."""
    watch_prior: bool = False
    """At every evaluation also measure how well the network still does its base's task: the velocity loss of noised
    image latents, logged as heldout_parts.prior; it is not trained on. Ours."""
    cache: bool = True
    """Keep the VAE's latents on disk, each computed once; only where training changes no colours, crops or
    rotations. Ours."""
    cache_folder: str = ""
    """The cache's folder; RUN/latents by default. Runs with the same labels and VAE may share it."""

    def __post_init__(self) -> None:
        faults = unknown_words(self) + below(
            self, distance_weight=0, gradient=0, trajectory=0, image_mse=0, image_ssi=0, image_gradient=0,
            noise_strength=0, timestep=0, first_index=0, gradient_scales=1,
        )  # fmt: skip
        faults += above(self, timestep=STEPS - 1, first_index=STEPS - 1, gradient_scales=8, blend=1.0, reach=1e6)
        faults += below(self, blend=0.0, filter_timestep=-STEPS)
        if not 0.0 <= self.quantile < 0.5:
            faults.append(f"quantile must be in [0, 0.5), not {self.quantile}")
        if not self.reach > 1.0:
            faults.append(f"reach must be above 1, not {self.reach}")
        if self.method == "feed_forward":
            faults += self._one_pass()
        raise_faults(faults)

    def _one_pass(self) -> list[str]:
        faults = []
        if not self.negated and (self.timestep or self.random_timestep):
            faults.append(
                "timestep and random_timestep are GenPercept's, which needs negated = true; FiffDepth's t is 0"
            )
        if not any((self.distance_weight, self.gradient, *self.image_weights)):
            faults.append("distance_weight, gradient and the weights of images are all 0: nothing to learn")
        return faults

    @property
    def image_weights(self) -> tuple[float, float, float]:
        """The weights of the images' mse, aligned L1 and gradient."""
        return self.image_mse, self.image_ssi, self.image_gradient

    @property
    def teacher(self) -> str:
        """The teacher that reads networks trained so."""
        return "marigold" if self.method == "denoise" else "genpercept" if self.negated else "fiffdepth"

    @property
    def content(self) -> dict[str, Any]:
        """The settings that change the numbers of a run."""
        return {key: value for key, value in asdict(self).items() if key not in _NEUTRAL}
