"""Everything that decides what a training run learns, as validated settings.

One `Recipe` is a run's whole scientific content: the same recipe, data and seed give the same model.
Where the work happens (workers, folders, addresses) is not in it. Each default lives on its field alone;
a field that is None takes the value that suits the model in `Recipe.resolved`, and only there.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipelines.messages import InputError
from pipelines.specs import Fit, Fraction, FractionAboveZero, Resample, validated

SCRATCH = "scratch:"
SCRATCH_SIZES = ("tiny", "small", "base")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Decay = Annotated[float, Field(ge=0, lt=1)]


@validated
class Finetune:
    """What of the model learns, and how it is run."""

    freeze: Literal["none", "backbone"] = "none"
    """`backbone` trains the new head alone (and what `unfreeze_every_epochs` thaws)."""
    freeze_blocks: NonNegativeInt = 0
    """First blocks that stay as they are, the embeddings with them; 0 freezes nothing."""
    unfreeze_every_epochs: NonNegativeInt = 0
    """Gradual unfreezing: thaw the next block from the top every so many epochs; 0 never thaws."""
    lora_r: NonNegativeInt = 0
    """Rank of LoRA adapters, through peft: they and the head learn, nothing else; 0 trains the weights."""
    lora_alpha: PositiveInt = 16
    """Adapters count `lora_alpha / lora_r` times."""
    lora_dropout: Decay = 0.0
    """Dropout before the adapters."""
    lora_target_modules: str = "all-linear"
    """Which layers get adapters: `all-linear` is all but the head, else a regular expression over names."""
    drop_path: Fraction = 0.0
    """Stochastic depth: chance that the last block is skipped for an image, rising linearly from 0."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Run the model through torch.compile."""

    def __post_init__(self) -> None:
        if self.unfreeze_every_epochs and self.freeze == "none":
            raise ValueError("unfreeze_every_epochs needs a frozen start; set freeze to backbone")
        if self.lora_r and self.freeze == "backbone":
            raise ValueError("lora_r adapts the body that freeze backbone leaves as it is; set only one")


@validated
class Optimizer:
    """AdamW and its schedule, per optimizer step over the global batch."""

    learning_rate: PositiveFloat | None = None
    """Peak learning rate; unset: 5e-4 from scratch, 1e-4 for a pretrained model, 1e-3 with LoRA."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices; biases, norms, class token and positions have none."""
    adam_beta2: Decay = 0.999
    """AdamW's second-moment decay."""
    layer_decay: FractionAboveZero = 1.0
    """Learning-rate factor per block going down from the head; 1 is the same rate everywhere."""
    head_lr_factor: PositiveFloat = 1.0
    """Learning rate of the new head over that of the body's top; 10 is usual for a good body."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: NonNegativeFloat = 0.1
    """Linear warm-up in optimizer steps; below 1 a fraction of all steps."""
    min_lr_ratio: Fraction = 0.01
    """Last learning rate as a fraction of the peak (cosine and linear)."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per worker and optimizer step."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: Decay | None = None
    """Decay per step of the averaged weights; 0 keeps none; unset: 0.998 from scratch, else 0."""

    @property
    def peak(self) -> float:
        """The learning rate of a resolved recipe."""
        if self.learning_rate is None:
            raise ValueError("learning_rate is unset; resolve the recipe first")
        return self.learning_rate


@validated
class Loss:
    """What is minimised."""

    label_smoothing: Fraction | None = None
    """Share of the target spread over all classes, or over yes and no of each; unset: 0.1, multi-label 0."""
    focal_gamma: NonNegativeFloat = 0.0
    """Focal loss exponent (Lin et al. 2017); 0 is plain cross entropy; not for the asymmetric loss."""
    multi_label: Literal["bce", "asymmetric"] = "bce"
    """Loss of a multi-label model; `asymmetric` is Ridnik et al. 2021."""
    gamma_negative: NonNegativeFloat = 4.0
    """Asymmetric loss: focusing of absent labels."""
    gamma_positive: NonNegativeFloat = 1.0
    """Asymmetric loss: focusing of present labels."""
    probability_margin: Fraction = 0.05
    """Asymmetric loss: an absent label below this probability costs nothing."""

    @property
    def smoothing(self) -> float:
        """The label smoothing of a resolved recipe."""
        if self.label_smoothing is None:
            raise ValueError("label_smoothing is unset; resolve the recipe first")
        return self.label_smoothing

    def __post_init__(self) -> None:
        if self.focal_gamma and self.multi_label == "asymmetric":
            raise ValueError(
                f"focal_gamma is {self.focal_gamma} and the asymmetric loss does not know it; "
                "set its own gamma_negative and gamma_positive, or leave multi_label at bce"
            )


@validated
class ClassBalance:
    """What is done about rare classes; every choice is counted from the training split alone.

    Weights and adjustment correct the counts that sampling leaves: nothing, where each image has one label
    and every class is drawn as often.
    """

    class_weights: Literal["none", "inverse", "sqrt", "effective"] = "none"
    """Weight of a class in the loss (`effective`: Cui et al. 2019); multi-label: its positives."""
    effective_beta: Decay = 0.999
    """Beta of the effective number of samples."""
    sampling: Literal["none", "oversample", "undersample", "target"] = "none"
    """Images per class and epoch: as they are, up to the largest class, down to the smallest, or a target."""
    target_per_class: NonNegativeInt = 0
    """Images per class and epoch when sampling is `target`."""
    logit_adjustment: NonNegativeFloat = 0.0
    """Tau of logit adjustment in training (Menon et al. 2021); 1 is the paper's; 0 is off."""

    def __post_init__(self) -> None:
        if (self.sampling == "target") != (self.target_per_class > 0):
            raise ValueError("target_per_class goes with sampling `target`: set both or neither")


@validated
class Augment:
    """Random changes of training images, on the training device; evaluation never sees them."""

    repeats: PositiveInt | None = None
    """Augmented views of each image per epoch (Hoffer et al. 2020); unset: 2 from scratch, else 1."""
    min_crop_scale: FractionAboveZero = 0.35
    """Smallest share of the picture that a random crop keeps; 1 does not crop."""
    crop_aspect: Annotated[float, Field(ge=1)] = 4 / 3
    """Largest distortion of a crop's aspect ratio."""
    flip: Fraction = 0.5
    """Chance of a left-right flip."""
    vertical_flip: Fraction = 0.0
    """Chance of an upside-down flip."""
    rotation_degrees: NonNegativeFloat = 0.0
    """Largest rotation either way."""
    brightness: NonNegativeFloat = 0.0
    """Largest relative change of brightness."""
    contrast: NonNegativeFloat = 0.0
    """Largest relative change of contrast."""
    saturation: NonNegativeFloat = 0.0
    """Largest relative change of saturation."""
    hue_degrees: NonNegativeFloat = 0.0
    """Largest turn of the hue either way, degrees of the colour circle."""
    blur: Fraction = 0.0
    """Chance of a Gaussian blur, sigma 0.1 to 2 pixels."""
    erasing: Fraction = 0.0
    """Chance that a rectangle of 2 to 33 % gets a random colour (Zhong et al. 2020)."""
    randaugment_num_ops: NonNegativeInt = 0
    """RandAugment-like policy: random operations per image; 0 is off."""
    randaugment_magnitude: NonNegativeFloat = 5.0
    """Strength of the policy's operations, 0 to 10."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup's Beta distribution (Zhang et al. 2018); 0 is off."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of cutmix's Beta distribution (Yun et al. 2019); 0 is off."""
    mix_prob: Fraction = 0.5
    """Chance that a pair of images is mixed when mixup or cutmix is on."""


@validated
class EarlyStopping:
    """When to stop before the last epoch."""

    patience_epochs: NonNegativeInt = 0
    """Epochs, or their worth of steps, without a better validation score before training stops; 0 never."""
    min_delta: NonNegativeFloat = 0.0
    """Smallest gain that counts as better."""


def _check_scratch(model: str, image_size: int, patch_size: int) -> None:
    names = [f"{SCRATCH}{size}" for size in SCRATCH_SIZES]
    if model not in names:
        raise InputError(f"model is {model}; from scratch it must be {', '.join(names)}")
    if image_size % patch_size:
        raise InputError(f"image_size is {image_size}; it must be a multiple of patch_size {patch_size}")


@validated
class Recipe:
    """One training run, up to its data."""

    model: str = "google/vit-base-patch16-224-in21k"
    """Hugging Face name, local folder, or `scratch:tiny|small|base` for random weights."""
    image_size: PositiveInt | None = None
    """Height and width of the model's input, pixels; unset: what its preprocessor says, 224 from scratch."""
    fit: Fit | None = None
    """`stretch` to both sides, `crop` the centre, `pad` with black; unset: as the model's preprocessor."""
    resample: Resample | None = None
    """Filter of resizing; unset: the model's own, bilinear from scratch."""
    crop_fraction: FractionAboveZero | None = None
    """What the centre crop keeps of each resized side, 0.875 being 224 of 256; unset: the model's own."""
    patch_size: PositiveInt | None = None
    """Patch side of a scratch model, pixels; unset: 16."""
    layers: PositiveInt | None = None
    """Blocks of a scratch model; unset: the preset's."""
    epochs: PositiveInt = 10
    """Passes over the training split (each image `augment.repeats` times)."""
    max_steps: NonNegativeInt = 0
    """Optimizer steps after which training ends, where the epochs have more; 0: the epochs decide."""
    max_time_s: NonNegativeFloat = 0.0
    """Seconds of training and validation after which training ends, restarts included; 0: no limit."""
    evaluate_every_steps: NonNegativeInt = 0
    """Also evaluate, and keep a checkpoint, every so many steps; 0: at the end of each epoch only."""
    batch_size: PositiveInt = 64
    """Images per optimizer step, over all workers and micro-batches."""
    seed: int = 0
    """Seed of the weights, the order, the augmentation and the dropout."""
    precision: Precision = "auto"
    """Autocast type; `auto` is bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU."""
    metric_for_best_model: str = "auto"
    """Validation metric that picks the best epoch; `auto` is accuracy, or map when multi-label."""
    target_precision: FractionAboveZero = 0.9
    """Share of right answers that each category's threshold is set for."""
    threshold_goal: Literal["precision", "recall", "f1"] = "precision"
    """What thresholds are set for: `target_precision`, `target_recall`, or the best F1."""
    target_recall: FractionAboveZero = 0.9
    """Share of a category's images that its threshold lets through, with `threshold_goal: recall`."""
    threshold_confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.9
    """How sure it must be, from the validation images, that new images reach `target_precision`."""
    finetune: Finetune = Finetune()
    """What learns."""
    optimizer: Optimizer = Optimizer()
    """How it learns."""
    loss: Loss = Loss()
    """From what it learns."""
    class_balance: ClassBalance = ClassBalance()
    """Rare classes."""
    augment: Augment = Augment()
    """Random changes of images."""
    early_stopping: EarlyStopping = EarlyStopping()
    """Early end."""

    def __post_init__(self) -> None:
        if not self.is_scratch and (self.patch_size or self.layers):
            raise ValueError("patch_size and layers describe a scratch model; a pretrained one has its own")
        if self.is_scratch and self.finetune.lora_r:
            raise ValueError("lora_r adapts a pretrained model; one from scratch learns all its weights")
        if self.is_scratch:
            _check_scratch(self.model, self.image_size or 224, self.patch_size or 16)

    @property
    def is_scratch(self) -> bool:
        return self.model.startswith(SCRATCH)

    def resolved(self, *, multi_label: bool) -> "Recipe":
        """The recipe with every None and `auto` but the precision replaced by what will be used.

        Raises:
            InputError: a loss that the dataset's labels cannot have.
        """
        if self.loss.multi_label == "asymmetric" and not multi_label:
            raise InputError(
                "loss.multi_label is asymmetric, and the dataset has one label for each image: leave it at "
                "bce, or put the labels into a column `labels`"
            )
        scratch = self.is_scratch
        optimizer = _with_defaults(
            self.optimizer,
            learning_rate=5e-4 if scratch else 1e-3 if self.finetune.lora_r else 1e-4,
            ema_decay=0.998 if scratch else 0.0,
        )
        loss = _with_defaults(self.loss, label_smoothing=0.0 if multi_label else 0.1)
        augment = _with_defaults(self.augment, repeats=2 if scratch else 1)
        metric = self.metric_for_best_model
        if metric == "auto":
            metric = "map" if multi_label else "accuracy"
        sizes = {"image_size": 224, "patch_size": 16} if scratch else {}
        resolved: Recipe = _with_defaults(
            replace(self, optimizer=optimizer, loss=loss, augment=augment, metric_for_best_model=metric),
            **sizes,
        )
        return resolved

    def micro_batch(self, workers: int) -> int:
        """Images of one forward pass on one worker.

        Raises:
            InputError: the batch cannot be cut evenly, which would weigh images unequally.
        """
        parts = workers * self.optimizer.gradient_accumulation_steps
        if self.batch_size % parts:
            raise InputError(
                f"batch_size is {self.batch_size}; it must be a multiple of {parts}"
                f" ({workers} workers x {self.optimizer.gradient_accumulation_steps} micro-batches)"
            )
        return self.batch_size // parts


@validated
class Search:
    """How long and how widely to look."""

    trials: PositiveInt = 16
    """Recipes tried."""
    grace_epochs: PositiveInt = 2
    """Epochs that every trial gets before it can be stopped for being worse than others."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """Of so many trials at each rung, one goes on."""
    max_concurrent: NonNegativeInt = 0
    """Trials at once; 0: as many as the cluster's CPUs or GPUs allow."""
    seed: int = 0
    """Seed of the proposals."""


def _with_defaults(spec: Any, **defaults: Any) -> Any:
    """The spec with these values where it has None."""
    return replace(spec, **{name: value for name, value in defaults.items() if getattr(spec, name) is None})
