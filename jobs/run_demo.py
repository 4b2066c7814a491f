"""`iab-vision demo`: the whole story on pictures that it draws itself, in one folder, with one command.

    iab-vision demo --output demo-output

About two and a half minutes on two CPU cores. Expected result: a test accuracy far above the chance of one
in six, a bundle with its certificate, a verified table in which the broken files have their reasons, three
nights of which the last has a drift alarm, exit code 0. The last lines name the pages to open.
"""

import json
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jobs import demo_images
from jobs.cli import main
from jobs.settings import Folder, JobConfig
from pipelines.messages import InputError, JobFailed

PICTURES_PER_CLASS = 100
NEW_PICTURES = 120
EPOCHS = 14
SEED = 20
MARKER = ".iab-vision-demo"
"""Says that a folder is a demo's and may be emptied by the next."""
MADE = ("dataset", "new", "run", "bundle", "inventory.parquet", "predictions", "site", "nights")
SAILING = "530"
"""What nearly all new pictures of the third night show."""

console = Console()


class DemoConfig(JobConfig):
    """Draw pictures, train, export, classify, verify and publish three nights, all on this machine."""

    output: Folder = "demo-output"
    """Folder for the demo's dataset, run, bundle and predictions; a second run replaces them."""


def run(config: DemoConfig) -> int:
    """Draw, train, export, classify, verify, show; then three nights of a site that changes."""
    started = time.monotonic()
    root = Path(config.output).absolute()
    here = shlex.quote(str(root))
    empty_folder(root)
    tell("draw", f"{PICTURES_PER_CLASS} pictures of each of {len(demo_images.SUBJECTS)} IAB categories")
    demo_images.draw_dataset(root / "dataset", per_class=PICTURES_PER_CLASS, seed=SEED)
    tell("train", "a small Vision Transformer from random weights, two Ray Train workers")
    run_command(
        f"train --dataset {here}/dataset --output {here}/run --model scratch:tiny --image-size 48 "
        f"--patch-size 8 --layers 4 --epochs {EPOCHS} --num-workers 2 --augment.min-crop-scale 0.5"
    )
    tell("export", "the best checkpoint to ONNX, compared with it on the pictures")
    run_command(f"export --checkpoint {here}/run --images {here}/dataset --output {here}/bundle")
    truth = write_inventory(root)
    tell("classify", "new pictures and some broken files, as a publisher's inventory")
    run_command(
        f"classify --inventory {here}/inventory.parquet --bundle {here}/bundle --output {here}/predictions "
        "--retry-pause-s 0 --fetch.max-attempts 2"
    )
    tell("verify", "that every row is there once, unaltered")
    run_command(f"verify {here}/predictions")
    show(root, truth)
    make_nights(root)
    show_nights(root)
    say(f"\nThe demo took {time.monotonic() - started:.0f} s. Pages to open in a browser:\n")
    for page in pages(root):
        say(f"  {page}")
    return 0


def run_command(line: str) -> None:
    """Run a command as it would be typed after `iab-vision`. Raises JobFailed."""
    say(f"iab-vision {line}")
    command, *settings = shlex.split(line)
    if code := main([command, *settings]):
        raise JobFailed(f"{command} ended with exit code {code}; see its messages above")


def empty_folder(root: Path) -> None:
    """Empty a folder that an earlier demo made; refuse any other that holds something."""
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).exists():
            raise InputError(f"{root} is not empty and is not a demo's; choose another --output")
        for name in MADE:
            path = root / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()


def tell(stage: str, what: str) -> None:
    console.print(f"\n[bold]{stage}[/bold]  {what}")


def write_inventory(root: Path) -> dict[str, str]:
    """New pictures that no model has seen, some of them twice, broken ones and a missing one.

    Returns the true category of each new picture by its URI.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(SEED + 1)
    folder = root / "new"
    folder.mkdir()
    truth = {}
    for number in range(NEW_PICTURES):
        subject = str(rng.choice(list(demo_images.SUBJECTS)))
        payload, extension = demo_images.encode(demo_images.draw(subject, rng), rng)
        path = folder / f"{number:04d}.{extension}"
        path.write_bytes(payload)
        truth[str(path)] = subject
    for name, payload in demo_images.broken_files(SEED):
        (folder / name).write_bytes(payload)
    uris = sorted(str(path) for path in folder.iterdir())
    uris += [str(folder / "gone.jpg"), *uris[:10]]
    pages = [f"https://publisher.example/page/{number // 4}" for number in range(len(uris))]
    ids = [f"image-{number:04d}" for number in range(len(uris))]
    table = pa.table({"image_id": ids, "uri": uris, "page_url": pages})
    pq.write_table(table, root / "inventory.parquet")
    return truth


def make_nights(root: Path) -> None:
    """Publish three nights of a site: as it is, after an ordinary day, and after a day of sailing."""
    site, here, rng = root / "site", shlex.quote(str(root)), np.random.default_rng(SEED + 2)
    shutil.copytree(root / "new", site)
    for number in range(3):
        day = date.today() - timedelta(days=2 - number)
        if number == 1:
            change_site(site, rng, new=list(rng.choice(list(demo_images.SUBJECTS), 12)), moved=5)
        elif number == 2:
            change_site(site, rng, new=[SAILING] * 60, moved=0)
        tell("nightly", f"the site on {day}: {len(list(site.iterdir()))} files")
        run_command(
            f"nightly --inventory {here}/site --bundle {here}/bundle --table {here}/nights --date {day} "
            "--retry-pause-s 0"
        )


def change_site(site: Path, rng: np.random.Generator, *, new: Sequence[str], moved: int) -> None:
    """Remove 4 pictures, rename some, draw other ones in place of 6, and add new ones of these subjects."""
    pictures = rng.permutation(sorted(str(path) for path in site.glob("*[0-9].*")))
    gone, renamed, other = np.split(pictures, [4, 4 + moved])
    for path in map(Path, gone):
        path.unlink()
    for path in map(Path, renamed):
        path.rename(path.with_stem(f"moved-{path.stem}"))
    for path in map(Path, other[:6]):
        subject = str(rng.choice(list(demo_images.SUBJECTS)))
        path.write_bytes(demo_images.encode(demo_images.draw(subject, rng), rng)[0])
    for number, subject in enumerate(new):
        payload, extension = demo_images.encode(demo_images.draw(subject, rng), rng)
        (site / f"new-{len(new)}-{number}.{extension}").write_bytes(payload)


def show_nights(root: Path) -> None:
    """Where the results of each night come from."""
    columns = ("rows", "carried over", "of known bytes", "classified or failed", "removed", "drift")
    table = Table("night", *columns)
    for path in sorted((root / "nights" / "state").glob("run_date=*/report.json")):
        report = json.loads(path.read_text())
        rows, images = report["night"]["rows"], report["night"]["images"]
        counts = (report["rows"], rows["carried"], rows["same_bytes"], rows["tonight"], images["removed"])
        table.add_row(path.parent.name.removeprefix("run_date="), *map(str, counts), report["drift"]["level"])
    console.print()
    console.print(table)


def pages(root: Path) -> list[Path]:
    """The pages that a demo leaves, the last night's at the end."""
    nights = sorted((root / "nights" / "state").glob("run_date=*/report.html"))
    return [
        root / "run" / "report" / "report.html",
        root / "predictions" / "state" / "report.html",
        nights[-1],
    ]


def show(root: Path, truth: dict[str, str]) -> None:
    """A few predictions, counts by status, the paths of everything made, and how to read it."""
    import pyarrow.dataset as pads

    rows = pads.dataset(root / "predictions" / "table", format="parquet").to_table().to_pylist()
    distinct = list({row["uri"]: row for row in rows}.values())
    labelled = [row for row in distinct if row["status"] == "ok"]
    failed = [row for row in distinct if row["status"] != "ok"]
    show_rows([*labelled[:8], *failed], truth)
    known = [row for row in labelled if row["uri"] in truth]
    right = sum(row["top_id"] == truth[row["uri"]] for row in known)
    share = right / max(1, len(known))
    say(
        f"\n{right} of {len(known)} new pictures are labelled as drawn: {share:.0%}, where "
        f"chance is {1 / len(demo_images.SUBJECTS):.0%}. They are drawings: the figure says that the stages "
        "fit together, and nothing about photographs.\n"
    )
    statuses = Counter(row["status"] for row in rows)
    say("rows by status: " + ", ".join(f"{name} {n}" for name, n in sorted(statuses.items())) + "\n")
    for name in MADE:
        say(f"  {root / name}")
    say("\nRead the table, for example:\n")
    say(f"  duckdb -c \"FROM '{root}/predictions/table/*.parquet' SELECT tier1_id, count(*) GROUP BY 1\"")


def show_rows(rows: Sequence[dict[str, Any]], truth: dict[str, str]) -> None:
    from pipelines.taxonomy import taxonomy

    paths = taxonomy.load("3.1")
    table = Table("picture", "score", "category, or why there is none", "drawn as")
    for row in rows:
        drawn = truth.get(row["uri"])
        hit = "the same" if drawn == row["top_id"] else paths.node(drawn).name if drawn else ""
        score = f"{row['top_score']:.2f}" if row["top_id"] else ""
        label = paths.path(row["top_id"]) if row["top_id"] else f"[red]{row['status']}[/red]"
        table.add_row(Path(row["uri"]).name, score, label, hit if row["top_id"] else "")
    console.print()
    console.print(table)


def say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
