"""Everything that decides what a training run learns, as frozen dataclasses that check themselves.

One `Recipe` is a run's whole scientific content: the same recipe, data and seed give the same model.
Where the work happens (workers, folders, addresses) is not in it. Each default lives on its field alone;
a field that is None takes the value that suits the model in `Recipe.resolved`, and only there. Standard
library only: the command line reads this in milliseconds.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipelines.specs import at_least, share

SCRATCH = "scratch:"
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Network:
    """What of the model learns, and how it is run."""

    freeze: Literal["none", "backbone"] = "none"
    """`backbone` trains the new head alone (and what `unfreeze_every_epochs` thaws)."""
    freeze_blocks: int = 0
    """First blocks that stay as they are, the embeddings with them; 0 freezes nothing."""
    unfreeze_every_epochs: int = 0
    """Gradual unfreezing: thaw the next block from the top every so many epochs; 0 never thaws."""
    drop_path: float = 0.0
    """Stochastic depth: chance that the last block is skipped for an image, rising linearly from 0."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Run the model through torch.compile."""

    def __post_init__(self) -> None:
        at_least("freeze_blocks", self.freeze_blocks, 0)
        at_least("unfreeze_every_epochs", self.unfreeze_every_epochs, 0)
        share("drop_path", self.drop_path)
        if self.unfreeze_every_epochs and self.freeze == "none":
            raise ValueError("unfreeze_every_epochs needs a frozen start; set freeze to backbone")


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its schedule, per optimiser step over the global batch."""

    learning_rate: float | None = None
    """Peak learning rate; unset: 5e-4 from scratch, 1e-4 for a pretrained model."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms, class token and positions have none."""
    beta2: float = 0.999
    """AdamW's second-moment decay."""
    layer_decay: float = 1.0
    """Learning-rate factor per block going down from the head; 1 is the same rate everywhere."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: float = 0.1
    """Linear warm-up: below 1 a share of all steps, otherwise steps."""
    final_share: float = 0.01
    """Last learning rate as a share of the peak (cosine and linear)."""
    accumulation: int = 1
    """Micro-batches per worker and optimiser step."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: float | None = None
    """Decay per step of the averaged weights; 0 keeps none; unset: 0.998 from scratch, else 0."""

    @property
    def peak(self) -> float:
        """The learning rate of a resolved recipe."""
        if self.learning_rate is None:
            raise ValueError("learning_rate is unset; resolve the recipe first")
        return self.learning_rate

    def __post_init__(self) -> None:
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        at_least("weight_decay", self.weight_decay, 0)
        at_least("warmup", self.warmup, 0)
        at_least("accumulation", self.accumulation, 1)
        at_least("clip_norm", self.clip_norm, 0)
        share("final_share", self.final_share)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1")
        for name, value in (("ema_decay", self.ema_decay or 0.0), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class Loss:
    """What is minimised."""

    label_smoothing: float | None = None
    """Share of the target spread over all classes, or over yes and no of each; unset: 0.1, multi-label 0."""
    focal_gamma: float = 0.0
    """Focal loss exponent (Lin et al. 2017); 0 is plain cross entropy; not for the asymmetric loss."""
    multi_label: Literal["bce", "asymmetric"] = "bce"
    """Loss of a multi-label model; `asymmetric` is Ridnik et al. 2021."""
    gamma_negative: float = 4.0
    """Asymmetric loss: focusing of absent labels."""
    gamma_positive: float = 1.0
    """Asymmetric loss: focusing of present labels."""
    probability_margin: float = 0.05
    """Asymmetric loss: an absent label below this probability costs nothing."""

    @property
    def smoothing(self) -> float:
        """The label smoothing of a resolved recipe."""
        if self.label_smoothing is None:
            raise ValueError("label_smoothing is unset; resolve the recipe first")
        return self.label_smoothing

    def __post_init__(self) -> None:
        share("label_smoothing", self.label_smoothing or 0.0)
        share("probability_margin", self.probability_margin)
        for name in ("focal_gamma", "gamma_negative", "gamma_positive"):
            at_least(name, getattr(self, name), 0)
        if self.focal_gamma and self.multi_label == "asymmetric":
            raise ValueError(
                f"focal_gamma is {self.focal_gamma} and the asymmetric loss does not know it; "
                "set its own gamma_negative and gamma_positive, or leave multi_label at bce"
            )


@dataclass(frozen=True)
class Balance:
    """What is done about rare classes; every choice is counted from the training split alone.

    Weights and adjustment correct the counts that sampling leaves: nothing, where each image has one label
    and every class is drawn as often.
    """

    class_weights: Literal["none", "inverse", "sqrt", "effective"] = "none"
    """Weight of a class in the loss (`effective`: Cui et al. 2019); multi-label: its positives."""
    effective_beta: float = 0.999
    """Beta of the effective number of samples."""
    sampling: Literal["none", "oversample", "undersample", "target"] = "none"
    """Images per class and epoch: as they are, up to the largest class, down to the smallest, or a target."""
    target_per_class: int = 0
    """Images per class and epoch when sampling is `target`."""
    logit_adjustment: float = 0.0
    """Tau of logit adjustment in training (Menon et al. 2021); 1 is the paper's; 0 is off."""

    def __post_init__(self) -> None:
        at_least("logit_adjustment", self.logit_adjustment, 0)
        if not 0 <= self.effective_beta < 1:
            raise ValueError(f"effective_beta is {self.effective_beta}; it must be at least 0 and below 1")
        if (self.sampling == "target") != (self.target_per_class > 0):
            raise ValueError("target_per_class goes with sampling `target`: set both or neither")


@dataclass(frozen=True)
class Augment:
    """Random changes of training images, on the training device; evaluation never sees them."""

    views: int | None = None
    """Augmented views of each image per epoch (Hoffer et al. 2020); unset: 2 from scratch, else 1."""
    crop_area: float = 0.35
    """Smallest share of the picture that a random crop keeps; 1 does not crop."""
    crop_aspect: float = 4 / 3
    """Largest distortion of a crop's aspect ratio."""
    flip: float = 0.5
    """Chance of a left-right flip."""
    vertical_flip: float = 0.0
    """Chance of an upside-down flip."""
    rotation_degrees: float = 0.0
    """Largest rotation either way."""
    brightness: float = 0.0
    """Largest relative change of brightness."""
    contrast: float = 0.0
    """Largest relative change of contrast."""
    saturation: float = 0.0
    """Largest relative change of saturation."""
    hue_degrees: float = 0.0
    """Largest turn of the hue either way, degrees of the colour circle."""
    blur: float = 0.0
    """Chance of a Gaussian blur, sigma 0.1 to 2 pixels."""
    erasing: float = 0.0
    """Chance that a rectangle of 2 to 33 % gets a random colour (Zhong et al. 2020)."""
    policy_operations: int = 0
    """RandAugment-like policy: random operations per image; 0 is off."""
    policy_magnitude: float = 5.0
    """Strength of the policy's operations, 0 to 10."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (Zhang et al. 2018); 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta distribution (Yun et al. 2019); 0 is off."""
    mix_chance: float = 0.5
    """Chance that a pair of images is mixed when mixup or cutmix is on."""

    def __post_init__(self) -> None:
        for name in ("flip", "vertical_flip", "blur", "erasing", "mix_chance"):
            share(name, getattr(self, name))
        for name in (
            "rotation_degrees", "brightness", "contrast", "saturation", "hue_degrees", "policy_operations",
            "policy_magnitude", "mixup", "cutmix",
        ):  # fmt: skip
            at_least(name, getattr(self, name), 0)
        at_least("crop_aspect", self.crop_aspect, 1)
        if self.views is not None:
            at_least("views", self.views, 1)
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area is {self.crop_area}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Stopping:
    """When to stop before the last epoch."""

    patience_epochs: int = 0
    """Epochs without a better validation score before training stops; 0 never stops early."""
    min_gain: float = 0.0
    """Smallest gain that counts as better."""

    def __post_init__(self) -> None:
        at_least("patience_epochs", self.patience_epochs, 0)
        at_least("min_gain", self.min_gain, 0)


@dataclass(frozen=True)
class Recipe:
    """One training run, up to its data."""

    model: str = "google/vit-base-patch16-224-in21k"
    """Hugging Face name, local folder, or `scratch:tiny|small|base` for random weights."""
    image_size: int | None = None
    """Height and width of the model's input, pixels; unset: the model's own, 224 from scratch."""
    patch_size: int | None = None
    """Patch side of a scratch model, pixels; unset: 16."""
    layers: int | None = None
    """Blocks of a scratch model; unset: the preset's."""
    epochs: int = 10
    """Passes over the training split (each image `augment.views` times)."""
    batch_size: int = 64
    """Images per optimiser step, over all workers and micro-batches."""
    seed: int = 0
    """Seed of the weights, the order, the augmentation and the dropout."""
    precision: Precision = "auto"
    """Autocast type; `auto` is bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU."""
    select_by: str = "auto"
    """Validation metric that picks the best epoch; `auto` is accuracy, or map when multi-label."""
    target_precision: float = 0.9
    """Share of right answers that each category's threshold is set for, on validation images."""
    network: Network = field(default_factory=Network)
    """What learns."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How it learns."""
    loss: Loss = field(default_factory=Loss)
    """From what it learns."""
    balance: Balance = field(default_factory=Balance)
    """Rare classes."""
    augment: Augment = field(default_factory=Augment)
    """Random changes of images."""
    stopping: Stopping = field(default_factory=Stopping)
    """Early end."""

    def __post_init__(self) -> None:
        at_least("epochs", self.epochs, 1)
        at_least("batch_size", self.batch_size, 1)
        if not 0 < self.target_precision <= 1:
            raise ValueError(f"target_precision is {self.target_precision}; it must be above 0 and at most 1")
        for name in ("image_size", "patch_size", "layers"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
        if not self.is_scratch and (self.patch_size or self.layers):
            raise ValueError("patch_size and layers describe a scratch model; a pretrained one has its own")

    @property
    def is_scratch(self) -> bool:
        return self.model.startswith(SCRATCH)

    def resolved(self, *, multi_label: bool) -> "Recipe":
        """The recipe with every None and `auto` but the precision replaced by what will be used.

        Raises:
            ValueError: a loss that the dataset's labels cannot have.
        """
        if self.loss.multi_label == "asymmetric" and not multi_label:
            raise ValueError(
                "loss.multi_label is asymmetric, and the dataset has one label for each image: leave it at "
                "bce, or put the labels into a column `labels`"
            )
        scratch = self.is_scratch
        optimizer = with_defaults(
            self.optimizer,
            learning_rate=5e-4 if scratch else 1e-4,
            ema_decay=0.998 if scratch else 0.0,
        )
        loss = with_defaults(self.loss, label_smoothing=0.0 if multi_label else 0.1)
        augment = with_defaults(self.augment, views=2 if scratch else 1)
        select_by = {"auto": "map" if multi_label else "accuracy"}.get(self.select_by, self.select_by)
        sizes = {"image_size": 224, "patch_size": 16} if scratch else {}
        resolved: Recipe = with_defaults(
            replace(self, optimizer=optimizer, loss=loss, augment=augment, select_by=select_by), **sizes
        )
        return resolved

    def micro_batch(self, workers: int) -> int:
        """Images of one forward pass on one worker.

        Raises:
            ValueError: the batch cannot be cut evenly, which would weigh images unequally.
        """
        parts = workers * self.optimizer.accumulation
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of {parts}"
                f" ({workers} workers x {self.optimizer.accumulation} micro-batches)"
            )
        return self.batch_size // parts


def with_defaults(spec: Any, **defaults: Any) -> Any:
    """The spec with these values where it has None."""
    return replace(spec, **{name: value for name, value in defaults.items() if getattr(spec, name) is None})
