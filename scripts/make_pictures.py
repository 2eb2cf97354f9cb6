"""Makes the pictures of the documentation: steering.gif, display.svg and three more of the display, trace.png,
tensorboard.png and report.png in docs/pictures.

    python scripts/make_pictures.py --minutes 5

It steers the embedded task for --minutes with `--profile` in a terminal of its own, films the base policy and the
steered one in the same episodes, and draws. It keeps what the working directory (`--work`) already holds. It needs
the extras `report` and `video`, and Chromium for the pictures of TensorBoard and of the report, which are left out
otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.server
import io
import itertools
import json
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from typing import Any

import av
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.text import Text

from dsrl_async.host.command import guard

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"display": (82, 50), "display_wide": (150, 40), "display_narrow": (44, 24)}
"""Sizes of the terminal in which the live display is recorded, in columns and lines, one after the other."""
RESIZED_S = {"display_wide": 60.0, "display_narrow": 30.0}
"""How long before the end it gets another size."""
ERASE = re.compile(rb"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)+")
"""What rich writes to remove a frame before the next one."""
BEGIN = re.compile(r"(?:\x1b\[[\d;]*m)*(?:╭|elapsed )")
"""How a frame begins, with or without a border."""
EPISODES, FILM_SEED, SHOWN = 12, 1000, 3
NOISE, STILL = 13, 5
"""Error of a film's compression in levels of 255; number of still frames that end a film."""
FRAME, GAP, CAPTION = 256, 12, 34  # pixels of the GIF
COLOURS_OF_GIF = 160
HOLD = 12  # frames for which an episode's end is shown
PATIENCE_S = 20.0  # for TensorBoard's page
BOARD, REPORT = (1240, 740), (1080, 1500)  # pixels of the pictures of pages
WORKERS_SHOWN, TRACE_S = 6, 1.0
COLOURS = {
    "physics": "#2f9150",
    "render": "#8fd19e",
    "reset": "#d9a400",
    "replay_write": "#7a5195",
    "prefix": "#1f5fbf",
    "denoise": "#7db3f2",
    "gather": "#e07a5f",
    "scatter": "#c0392b",
    "update": "#8e44ad",
    "sample": "#c39bd3",
    "publish": "#f39c12",
    "weights": "#f39c12",
    "checkpoint": "#555555",
}
"""Colours of phases and stages in the trace. Waits are grey, and the stages inside `compute` show it."""
WAITING = "#e3e6ea"


def run(work: Path, minutes: float) -> None:
    """Steer the embedded task and keep everything that its live display writes, by the size of the terminal."""
    if (work / "run" / "summary.json").is_file():
        return
    command = [sys.executable, "-m", "dsrl_async.launch", "--profile", "--max-minutes", str(minutes)]
    command += ["--run-dir", str(work / "run"), "--log.console", "live"]
    ours, theirs = pty.openpty()
    resize(theirs, SIZES["display"])
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    end, later = time.monotonic() + minutes * 60, list(RESIZED_S)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((work / "display.ansi").open("wb"))
        while True:
            if later and time.monotonic() >= end - RESIZED_S[later[0]]:
                name = later.pop(0)
                resize(ours, SIZES[name])
                file = stack.enter_context((work / f"{name}.ansi").open("wb"))
            try:
                file.write(os.read(ours, 1 << 16))
            except OSError:  # the run and its terminal have ended
                break
    if process.wait() != 0:
        raise SystemExit(f"the run failed; see {work / 'display_narrow.ansi'}")


def resize(terminal: int, size: tuple[int, int]) -> None:
    columns, lines = size
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def film(work: Path, name: str, *options: str) -> dict[int, Path]:
    """Play and film the episodes. Returns the films of a kind by episode number."""
    directory = work / name
    if not directory.is_dir():
        command = [sys.executable, "-m", "dsrl_async.evaluate", "--episodes", str(EPISODES), "--seed", str(FILM_SEED)]
        command += ["--video", str(directory), "--videos", str(EPISODES), "--out", f"{directory}-episodes", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {int(path.name.split("-")[1]): path for path in sorted(directory.glob("*.mp4"))}


def read_film(path: Path) -> list[np.ndarray]:
    """The frames of the first camera, uint8 [256, 256, 3] each, without the still ones at the end.

    What differs from the frame before only by the film's compression is taken from there, so that the GIF is small.
    """
    with av.open(str(path)) as film:
        frames = [frame.to_ndarray(format="rgb24")[:, :256] for frame in film.decode(video=0)]
    for before, frame in itertools.pairwise(frames):
        still = np.abs(frame.astype(int) - before).max(-1, keepdims=True) < NOISE
        np.copyto(frame, before, where=still)
    return frames[: len(frames) - STILL]


def draw_steering(work: Path, out: Path) -> None:
    """The same episodes side by side: where the base policy fails and the steered one succeeds."""
    base, steered = film(work, "base"), film(work, "steered", "--checkpoint", str(work / "run"))
    numbers = [
        number
        for number in sorted(base.keys() & steered.keys())
        if base[number].stem.endswith("failure") and steered[number].stem.endswith("success")
    ][:SHOWN]
    if not numbers:
        raise SystemExit(f"no episode in which only the steered policy succeeds; train longer, or look into {work}")
    minutes = json.loads((work / "run" / "summary.json").read_text())["wall_s"] / 60
    titles = ("the frozen policy", f"steered for {minutes:.0f} minutes")
    pages = []
    for number in numbers:
        pair = [read_film(base[number]), read_film(steered[number])]
        longest = max(map(len, pair))
        for index in range(longest + HOLD):
            ended = ("failure" if index >= len(pair[0]) else "", "success" if index >= len(pair[1]) else "")
            images = [frames[min(index, len(frames) - 1)] for frames in pair]
            pages.append(side_by_side(images, titles, ended))
    some = np.hstack([np.asarray(page) for page in pages[:: max(1, len(pages) // 10)]])
    palette = Image.fromarray(some).quantize(COLOURS_OF_GIF)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    pages[0].save(out, save_all=True, append_images=pages[1:], duration=100, loop=0, optimize=True)


def side_by_side(images: list[np.ndarray], titles: tuple[str, ...], ended: tuple[str, ...]) -> Image.Image:
    page = Image.new("RGB", (2 * FRAME + 3 * GAP, FRAME + CAPTION + 2 * GAP), "#ffffff")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    for column, (image, title, end) in enumerate(zip(images, titles, ended, strict=True)):
        left = GAP + column * (FRAME + GAP)
        draw.text((left + FRAME // 2, GAP + CAPTION // 2 - 4), title, "#1c2430", font, anchor="mm")
        page.paste(Image.fromarray(image).resize((FRAME, FRAME), Image.Resampling.LANCZOS), (left, GAP + CAPTION))
        if end:
            colour = "#2f9150" if end == "success" else "#c0392b"
            box = (left, GAP + CAPTION, left + FRAME - 1, GAP + CAPTION + FRAME - 1)
            draw.rectangle(box, outline=colour, width=5)
            draw.rectangle((left + 5, GAP + CAPTION + 5, left + 97, GAP + CAPTION + 33), fill=colour)
            draw.text((left + 51, GAP + CAPTION + 19), end, "#ffffff", font, anchor="mm")
    return page


def frames_of(recording: Path) -> list[str]:
    """What the live display showed one after the other, with the colours."""
    written = recording.read_bytes().replace(b"\r\n", b"\n")
    frames = []
    for piece in ERASE.split(written):
        text = piece.decode(errors="replace")
        found = BEGIN.search(text)
        if found is not None:  # before that there are messages, behind it a message that came later
            frames.append(text[found.start() :].rstrip("\n"))
    return frames


def draw_frame(work: Path, out: Path, frame: str, columns: int) -> None:
    """A frame of the live display, as text in an SVG."""
    end = frame.rfind("╯")
    text = Text.from_ansi(frame[: end + 1] if end >= 0 else frame)
    minutes = yaml.safe_load((work / "run" / "config.yaml").read_text())["max_minutes"]
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(text)
    title = f"bash scripts/run.sh --max-minutes {minutes:g}" if columns > 60 else "scripts/run.sh"
    picture = console.export_svg(title=title, unique_id=out.stem.replace("_", "-"))
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # a picture must not fetch anything
    out.write_text(picture.replace("Fira Code", "ui-monospace, DejaVu Sans Mono"))


def draw_display(work: Path, out: Path) -> None:
    """A frame from the middle of the recording of that name, in which the run has learned something."""
    frames = frames_of(work / f"{out.stem}.ansi")
    draw_frame(work, out, frames[-2 if out.stem == "display" else len(frames) // 2], SIZES[out.stem][0])


def draw_start(work: Path, out: Path) -> None:
    """The frame in which most is waited for, the last one of several."""
    frames = frames_of(work / "display.ansi")
    waits = [len(re.findall(r", \d+ s\b", frame)) for frame in frames]
    draw_frame(work, out, frames[len(waits) - 1 - waits[::-1].index(max(waits))], SIZES["display"][0])


def draw_trace(work: Path, out: Path) -> None:
    """A second of every kind of process, from the run's trace for Perfetto."""
    events = json.loads((work / "run" / "profile" / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    spans = [event for event in events if event["ph"] == "X"]
    begin = clearest(spans, names) / 1e6
    workers = sorted(name for name in names.values() if name.startswith("actor"))[:WORKERS_SHOWN]
    rows = [*workers, "inference", "learner"]
    labels = [name.replace("actor-", "worker ") for name in workers] + ["inference", "learner"]
    figure, axes = plt.subplots(figsize=(10.5, 4.8), layout="constrained")
    used = set()
    for span in sorted(spans, key=lambda span: not span["name"].startswith("wait")):
        start = span["ts"] / 1e6 - begin
        process, name = names[span["pid"]], span["name"]
        if process not in rows or start > TRACE_S or start + span["dur"] / 1e6 < 0 or name == "compute":
            continue
        if span["tid"] == 2 and process == "learner":  # its stage is its phase
            continue
        waiting = name.startswith("wait")
        colour = WAITING if waiting else COLOURS[name]
        used.add(name if not waiting else "waiting")
        axes.barh(rows.index(process), span["dur"] / 1e6, left=start, height=0.66, color=colour, linewidth=0)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, TRACE_S)
    axes.set_xlabel("seconds")
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    shown = [name for name in COLOURS if name in used]
    if {"publish", "weights"} <= used:
        shown.remove("publish")  # the two sides of one thing have one colour
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in shown]
    handles.append(plt.Rectangle((0, 0), 1, 1, color=WAITING))
    titles = [*(name.replace("_", " ") for name in shown), "waiting"]
    figure.legend(handles, titles, loc="outside upper center", ncols=7, frameon=False, handlelength=1.2)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def clearest(spans: list[dict[str, Any]], names: dict[int, str]) -> float:
    """Start of the TRACE_S in which other programs held up the workers least, in the trace's microseconds.

    It begins with a batch, which the workers execute within it.
    """
    last = max(span["ts"] + span["dur"] for span in spans)
    batches = [span["ts"] for span in spans if span["name"] == "compute" and span["ts"] + TRACE_S * 1e6 < last]
    steps = [span for span in spans if names[span["pid"]].startswith("actor") and not span["name"].startswith("wait")]

    def held_up(begin: float) -> float:
        within = [span["dur"] for span in steps if begin < span["ts"] < begin + TRACE_S * 1e6]
        return float(np.mean(within)) if len(within) >= 2 * WORKERS_SHOWN else float("inf")

    return min(batches, key=held_up) - 0.03e6


def draw_tensorboard(work: Path, out: Path) -> None:
    """The first page that TensorBoard opens for a run: the run at a glance."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(work / "run"), "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.DEVNULL)
    try:
        time.sleep(PATIENCE_S)  # until the server has read the run
        take(f"http://localhost:{port}/?darkMode=false&smoothing=0.6#custom_scalars", BOARD, out)
    finally:
        server.terminate()
        server.wait()


def draw_report(work: Path, out: Path) -> None:
    """The top of a run's report, with evaluations of the base policy and of the steered one."""
    film(work, "base"), film(work, "steered", "--checkpoint", str(work / "run"))
    page = work / "report.html"
    command = [sys.executable, "-m", "dsrl_async.report", str(work / "run"), "--out", str(page)]
    command += [part for name in ("base", "steered") for part in ("--evaluation", f"{work / name}-episodes")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    take(page.resolve().as_uri(), REPORT, out)


def take(address: str, size: tuple[int, int], out: Path) -> None:
    """A picture of a page in a browser, `size` pixels wide and high."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print(f"no Chromium: {out.name} is left out", file=sys.stderr)
        return
    frame = f'<iframe src="{address}" style="border:0;width:{size[0]}px;height:{size[1]}px"></iframe>'
    page = f'<body style="margin:0;overflow:hidden">{frame}<img src="/late" style="display:none">'

    class Page(http.server.BaseHTTPRequestHandler):
        """A page that counts as loaded only when the one inside it has had time to draw."""

        def do_GET(self) -> None:
            if self.path == "/late":
                time.sleep(PATIENCE_S)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    outer = http.server.ThreadingHTTPServer(("localhost", 0), Page)
    threading.Thread(target=outer.serve_forever, daemon=True).start()
    shown = address if address.startswith("file:") else f"http://localhost:{outer.server_port}/"
    options = "--headless --no-sandbox --disable-gpu --enable-unsafe-swiftshader --hide-scrollbars --no-first-run "
    options += "--disable-background-networking --disable-component-update --disable-sync --disable-quic"
    try:
        with tempfile.TemporaryDirectory() as profile:
            where = [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", f"--screenshot={out}", shown]
            command = [browser, *options.split(), *where]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=10 * PATIENCE_S)
    finally:
        outer.shutdown()


PICTURES = {
    "steering.gif": draw_steering,
    "display.svg": draw_display,
    "display_wide.svg": draw_display,
    "display_narrow.svg": draw_display,
    "display_start.svg": draw_start,
    "trace.png": draw_trace,
    "tensorboard.png": draw_tensorboard,
    "report.png": draw_report,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to steer (default 5)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "pictures", help="where the run and films are kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="where the pictures are written")
    parser.add_argument("--only", nargs="*", choices=PICTURES, default=list(PICTURES), help="only these pictures")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    run(arguments.work, arguments.minutes)
    for name in arguments.only:
        PICTURES[name](arguments.work, arguments.out / name)


if __name__ == "__main__":
    sys.exit(guard(main))
