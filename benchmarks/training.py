"""Rows about training: one step, its memory, its input, and the losses of whole epochs."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks import data, script
from benchmarks.measure import (
    SCRIPT,
    NotMeasuredError,
    Options,
    Result,
    call,
    compare,
    compare_processes,
    median,
    run,
    timed,
)
from minigpt.common import files
from minigpt.config import ModelConfig
from minigpt.data import sequences
from minigpt.model.network import MiniGPT
from minigpt.training import fit, optimizers

PUBLISHED_LOSSES = [5.4696, 4.7016, 4.4533, 4.2985, 4.1787]  # the first epochs
PUBLISHED_STEP_S = 0.042  # on the authors' GPU
STEPS = 5  # memory grows during the first few


def step(options: Options, dtype: str = "float32") -> Result:
    """Seconds of a training step on the same batch, after checking that both sides agree."""
    x, y = batch()
    facts = {"batch": list(x.shape), "published_figure_s": PUBLISHED_STEP_S}
    if dtype == "float32":
        facts |= agreement(x, y)
    sides = ("here", dtype), (SCRIPT,)
    return Result(*compare_processes(f"{__name__}.side", *sides, options.rounds), facts)


def step_bfloat16(options: Options) -> Result:
    """Ours with bfloat16 products, float32 weights and loss; the script in float32, as it is."""
    if not _multiplies_bfloat16():
        raise NotMeasuredError("no bfloat16 products here")
    return step(options, "mixed_bfloat16")


def memory(options: Options) -> Result:
    """Peak memory in MB of a few steps, each side in a process of its own."""
    here: list[float] = []
    there: list[float] = []
    for _ in range(min(options.rounds, 3)):  # it hardly varies
        for name, found in (("here", here), (SCRIPT, there)):
            found.append(call(f"{__name__}.some_steps", name)[2])
    imports = call(f"{__name__}.some_steps", "neither")[2]
    return Result(here, there, {"imports_only_MB": imports})


def some_steps(name: str) -> None:
    """Trains one side for a few steps; "neither" only imports."""
    if name != "neither":
        train = side(name)
        for _ in range(STEPS):
            train()


def side(name: str, dtype: str = "float32") -> Callable[[], Any]:
    """Returns the training step of one side, which has the process to itself."""
    x, y = batch()
    if name == "here":
        model: keras.Model = trainer(dtype)
    else:
        model = script.compiled_model()
    return lambda: model.train_on_batch(x, y)


def input_share(options: Options) -> Result:
    """The time to read an epoch of input as a share of the time to train on it."""
    texts = data.texts(options.archive)
    model = trainer()
    shares: list[float] = []
    batches = [0]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "sequences")
        data.prepare(texts, where)
        for number in range(options.rounds):
            dataset: Any = None

            def read(number: int = number) -> None:
                nonlocal dataset
                dataset = sequences.dataset(where, "train", script.BATCH, seed=1, epoch=number)
                batches[:] = [0]
                for _ in dataset:
                    batches[0] += 1

            seconds = timed(read)
            x, y = next(iter(dataset))
            if not number:
                model.train_on_batch(x, y)
            took = timed(lambda: model.train_on_batch(x, y))  # noqa: B023 - called here and now
            shares.append(seconds / batches[0] / took)
    return Result(shares, facts={"batches": batches[0]})


def device(options: Options) -> Result:
    """The share of the device's measured peak that a step reaches, for each dtype of products."""
    size = 256 if script.TINY else 4096
    found = {}
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16" and not _multiplies_bfloat16():
            continue
        multiply = _compiled(ops.matmul)
        a = ops.cast(np.random.default_rng(0).normal(size=(size, size)), dtype)
        ready = lambda: np.asarray(ops.cast(multiply(a, a)[0, 0], "float32"))  # noqa: B023, E731
        ready()
        found[dtype] = [2e-9 * size**3 / timed(ready) for _ in range(options.rounds)]  # GFLOP/s
    shares = {}
    x, y = batch()
    for dtype, peak in found.items():
        model = trainer("float32" if dtype == "float32" else "mixed_bfloat16")
        model.train_on_batch(x, y)
        seconds = [timed(lambda: model.train_on_batch(x, y)) for _ in range(options.rounds)]  # noqa: B023
        shares[dtype] = [flop() / 1e9 / s / median(peak) for s in seconds]
    facts = {"GFLOP_per_s": found, "step_GFLOP": flop() / 1e9, "shares": shares}
    return Result(shares["float32"], facts={**facts, "device": accelerator() or "processor"})


def losses(options: Options) -> Result:
    """The training loss of each epoch of experiment=seed, beside the published one."""
    settings = {
        "groups.experiment": "seed",
        "train.epochs": options.epochs,
        "corpus.url": options.archive.resolve(),
        "corpus.sha256": files.sha256(data.existing(options.archive)),
    }
    choices = [part for key, value in settings.items() for part in ("-S", f"{key}={value}")]
    name = "bench-seed"
    run("sh", "-c", f"dvc exp remove -q {name} || true")
    run("dvc", "exp", "run", "--temp", "--name", name, *choices)
    with tempfile.TemporaryDirectory() as folder:
        got = Path(folder, "losses.csv")
        run("dvc", "get", "-q", ".", "reports/losses.csv", "--rev", name, "-o", got)
        rows = np.genfromtxt(got, delimiter=",", names=True, ndmin=1)
    found = [round(float(loss), 4) for loss in rows["seed_loss"]]
    return Result(found, PUBLISHED_LOSSES[: options.epochs])


def seed(options: Options) -> Result:
    """Our restatement of the published script (`here`) against the script itself."""
    document = options.seed / "miniature_gpt.md"
    if script.TINY or not document.exists():
        raise NotMeasuredError(f"{document} is missing, or this is a tiny run")
    original, vocabulary, texts = _published(document, data.texts(options.archive))
    restated = script.compiled_model()
    restated.set_weights(original.get_weights())
    x, y = batch()
    logits = np.asarray(original.predict_on_batch(x)[0]), np.asarray(restated.predict_on_batch(x))
    layer = script.vectorizer()
    layer.adapt(texts)
    facts = {
        "logits_differ_by": float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()),
        "vocabulary_identical": layer.get_vocabulary() == vocabulary,
    }
    if facts["logits_differ_by"] > 1e-5 or not facts["vocabulary_identical"]:
        raise RuntimeError(f"script.py differs from the published script: {facts}")
    seconds = compare(
        lambda: restated.train_on_batch(x, y),
        lambda: original.train_on_batch(x, [y, y]),
        options.rounds,
    )
    return Result(*seconds, facts)


def _published(document: Path, texts: Any) -> tuple[keras.Model, list[str], list[str]]:
    """Runs the script on a few hundred texts; returns its model, its vocabulary and the texts."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
    code = "\n\n".join(block for block in blocks if not block.startswith("!"))
    # Keras 3.15 refuses the way in which the script repeats its mask for each sequence.
    start, end = code.index("    mult = ops.concatenate("), code.index("class TransformerBlock")
    code = code[:start] + "    return mask\n\n\n" + code[end:]
    space: dict[str, Any] = {}
    chosen = texts.slice(0, 400).to_pylist()
    back = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(chosen):
            split, label = ("train", "test")[number % 2], ("pos", "neg")[number // 2 % 2]
            path = Path(folder, "aclImdb", split, label, f"{number}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        os.chdir(folder)
        try:
            exec(code[: code.index("class TextGenerator")], space)
        finally:
            os.chdir(back)
    return space["create_model"](), list(space["vocab"]), chosen


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Returns a batch of made-up tokens with the frequencies of words (Zipf)."""
    rng = np.random.default_rng(0)
    ranks = np.arange(2, script.VOCABULARY_SIZE)
    shares = 1 / (ranks + 8.0)
    tokens = rng.choice(ranks, (script.BATCH, script.LENGTH + 1), p=shares / shares.sum())
    return tokens[:, :-1].astype("int32"), tokens[:, 1:].astype("int32")


def network(key_dim: int = script.WIDTH, dtype: str = "float32", dropout: float = 0.1) -> MiniGPT:
    """Returns our model in the published size."""
    settings = {
        "vocabulary_size": script.VOCABULARY_SIZE,
        "context_length": script.LENGTH,
        "embed_dim": script.WIDTH,
        "num_blocks": 1,
        "num_heads": script.HEADS,
        "key_dim": key_dim,
        "feed_forward_dim": script.WIDTH,
        "dropout": dropout,
        "dtype_policy": dtype,
    }
    return MiniGPT(ModelConfig.model_validate(settings))


def trainer(dtype: str = "float32", optimizer: Any = None, dropout: float = 0.1) -> fit.LossModel:
    """Returns our side of a step, with the published loss, which counts padding too."""
    model = fit.LossModel(network(dtype=dtype, dropout=dropout), padded=True)
    # On a processor, XLA is slower than TensorFlow's own kernels; JAX has nothing else.
    model.compile(
        optimizer or keras.optimizers.Adam(), jit_compile=keras.backend.backend() == "jax"
    )
    return model


def agreement(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Checks that loss and gradients of both sides agree to 1e-5, relative.

    A step of plain descent reveals the gradients: its rate is so high that the old weights vanish
    in rounding. ReLU has no gradient at 0, and of 2.6 million activations one is often so close
    to 0 that rounding decides; a bias keeps all of them away from it.

    Raises:
        RuntimeError: They do not agree.
    """
    rate = 1e6
    ours = trainer(optimizer=keras.optimizers.SGD(rate), dropout=0.0)
    compiled = keras.backend.backend() == "jax"
    theirs = script.compiled_model(keras.optimizers.SGD(rate), 0.0, jit_compile=compiled)
    copy_weights(ours.network, theirs)
    ours.network.blocks[0].expand.bias.assign(script.bias_between_activations(theirs, x))
    copy_weights(ours.network, theirs)
    before = theirs.get_weights()
    theirs_loss = float(np.ravel(theirs.train_on_batch(x, y))[0])
    ours_loss = float(ours.train_on_batch(x, y, return_dict=True)["seed_loss"])
    after = zip(before, published_weights(ours.network), theirs.get_weights(), strict=True)
    pairs = [(np.linalg.norm(a - b), np.linalg.norm(old - b)) for old, a, b in after]
    # The gradient of the keys' bias is 0 but for rounding: it moves all scores of a row alike.
    least = 1e-6 * max(size for _, size in pairs)
    gap = max(float(distance / size) for distance, size in pairs if size > least)
    facts = {"loss_there": theirs_loss, "loss_here": ours_loss, "gradients_differ_by": gap}
    if gap > 1e-5 or abs(ours_loss - theirs_loss) > 1e-5 * theirs_loss:
        raise RuntimeError(f"loss or gradients differ from the published script's: {facts}")
    return facts


def published_weights(network: MiniGPT) -> list[np.ndarray]:
    """Returns our weights in the order and shapes of the script's."""
    block = network.blocks[0]
    layers = [block.query, block.key, block.value, block.attention_output]
    layers += [block.expand, block.contract, block.attention_norm, block.feed_forward_norm]
    weights = [network.token_embedding.embeddings, network.position_embedding.embeddings]
    weights += [weight for layer in layers for weight in layer.weights]
    weights += [network.head_kernel, network.head_bias]
    return [ops.convert_to_numpy(weight) for weight in weights]


def copy_weights(network: MiniGPT, published: keras.Model) -> None:
    """Copies our weights into the script's model."""
    published.set_weights(published_weights(network))


def flop() -> float:
    """Returns the floating-point operations of a step's matrix products, forward and backward."""
    width, inner = script.WIDTH, script.HEADS * script.WIDTH
    attention = script.LENGTH * inner  # half of 2 T: the rest is masked
    block = 4 * width * inner + 2 * width * width + attention
    return 3 * 2 * script.BATCH * script.LENGTH * (block + width * script.VOCABULARY_SIZE)


def accelerator() -> str | None:
    """Returns the name of JAX's first device, or None for a processor and other backends."""
    if keras.backend.backend() != "jax":
        return None
    import jax

    found = jax.devices()[0]
    return None if found.platform == "cpu" else str(found.device_kind)


def _multiplies_bfloat16() -> bool:
    return accelerator() is not None or optimizers.choose_dtype_policy() == "mixed_bfloat16"


def _compiled(function: Any) -> Any:
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function)
