"""Trains what docs/report.md shows, opens its pages in Chromium and takes the pictures.

    python scripts/report_pages.py [--runs DIR] [--figures DIR]

One run of 2,000 steps, nine short ones, three methods with three seeds, and one whose rollouts two vLLM
servers write, all of the model of ``rltrain tiny-model`` on a CPU. The same command continues where it was
stopped. It prints how long each page took to
load, and ends with exit code 1 where a page wrote an error to the console or is wider than its window. Needs
selenium, and Chromium or Chrome with its driver.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rltrain.analysis.pages.run_page import run_page
from rltrain.checkpoint.run_folder import RunFolder, write_atomic

ROOT = Path(__file__).parents[1]
STUDY = "recipes/studies/entropy"
METHODS = ("grpo", "clip_cov", "kl_cov")
SMALL = ("rollout.prompts=8", "learner.updates=2", "eval.prompts=128", "eval.n=8")
LONG = (*SMALL, "train.steps=2000", "eval.every=200", "checkpoint.every=200")
SHORT = (*SMALL, "train.steps=60", "eval.every=20")
POOL = (*SMALL, "train.steps=12", "rollout.engine=vllm_server", "rollout.workers={count: 2}")
WINDOWS = ((1400, 900), (390, 844))  # pixels
SCHEMES = ("light", "dark")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
)
# name of the picture -> (page, element that stands at its top; "": the page's own top)
PICTURES = {
    "run": ("run", ""),
    "curves": ("run", "curves"),
    "timeline": ("run", "timeline"),
    "tokens": ("run", "tokens"),
    "lanes": ("pool", "lanes"),
    "comparison": ("comparison", ""),
    "comparison-curves": ("comparison", "curves"),
}


def find_browser() -> tuple[str, str] | None:
    """Chromium or Chrome and its driver on the PATH; None where one is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


@contextlib.contextmanager
def open_browser(width: int, height: int, scheme: str) -> Iterator[Any]:
    """A window of Chromium of this size in pixels, whose system is "light" or "dark"."""
    from selenium import webdriver

    programs = find_browser()
    if programs is None:
        raise SystemExit("no chromium (or google-chrome) and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
        try:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            yield driver
        finally:
            driver.quit()


def train_runs(runs: Path) -> dict[str, Path]:
    """Makes the model and trains what is not trained yet; the pages by name."""
    model = runs / "model"
    if not (model / "config.json").is_file():
        run_rltrain("tiny-model", "--out", str(model))
    path = f"model.path={model}"
    long = [word for setting in (path, *LONG) for word in ("--set", setting)]
    run_rltrain("train", f"{STUDY}/clip_cov.yaml", "--run", str(runs / "clip_cov"), *long)
    recipes = [f"{STUDY}/{name}.yaml" for name in METHODS]
    short = [word for setting in (path, *SHORT) for word in ("--set", setting)]
    run_rltrain("compare", *recipes, "--seeds", "3", "--out", str(runs / "compare"), *short)
    train_pool(runs)
    folder = RunFolder.from_path(runs / "clip_cov")
    write_atomic(folder.report, run_page(folder))  # by the code at hand, whichever trained
    return {
        "run": runs / "clip_cov/report.html",
        "pool": runs / "pool/report.html",
        "comparison": runs / "compare/comparison.html",
    }


def train_pool(runs: Path) -> None:
    """Trains on what two workers sample."""
    settings = (f"model.path={runs / 'model'}", *POOL)
    words = [word for setting in settings for word in ("--set", setting)]
    run_rltrain("train", "grpo", "--profile", "tiny_cpu", "--run", str(runs / "pool"), *words)


def run_rltrain(*words: str) -> None:
    """Raises SystemExit with the command's exit code where it is not 0."""
    done = subprocess.run([sys.executable, "-m", "rltrain", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def take_pictures(pages: dict[str, Path], figures: Path) -> list[str]:
    """Writes every picture in every window and scheme; returns what is wrong with the pages."""
    figures.mkdir(parents=True, exist_ok=True)
    problems = []
    for width, height in WINDOWS:
        for scheme in SCHEMES:
            for page, path in pages.items():
                with open_browser(width, height, scheme) as driver:
                    where = f"{page}, {width} pixels, {scheme}"
                    start = time.monotonic()
                    driver.get(path.resolve().as_uri())
                    seconds = time.monotonic() - start
                    sys.stdout.write(f"{where}: {path.stat().st_size / 1e6:.1f} MB in {seconds:.2f} s\n")
                    for name, (of_page, element) in PICTURES.items():
                        if of_page == page:
                            show(driver, element)
                            save(driver, figures / f"{name}-{width}-{scheme}.png")
                    actual = driver.execute_script("return document.documentElement.scrollWidth")
                    if actual != width:
                        problems.append(f"{where}: the page is {actual} pixels wide")
                    errors = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
                    problems += [f"{where}: {line['message']}" for line in errors]
    return problems


def show(driver: Any, element: str) -> None:
    """Brings ``element`` to the top of the window; "tokens": the completions, whose tokens it colours by
    whether a control touched them; "lanes": the last seconds of the run.
    """
    from selenium.webdriver.support.select import Select

    if element == "tokens":
        Select(driver.find_element("id", "order")).select_by_value("spread")
        Select(driver.find_element("id", "colour")).select_by_value("touched")
        is_phone = driver.execute_script("return innerWidth < 700")
        element = "group" if is_phone else "completions"
    elif element == "lanes":
        Select(driver.find_element("id", "lanes-span")).select_by_value("10")
        press_until_it_stands(driver, "lanes-later", "lanes-from")
    script = "document.getElementById(arguments[0])?.scrollIntoView({behavior: 'instant'})"
    driver.execute_script(script if element else "scrollTo(0, 0)", element)
    # a chart is drawn when it comes into view; two frames later everything in the window is
    driver.execute_async_script(
        "const done = arguments[0];"
        "setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(() => done())), 300)"
    )


def press_until_it_stands(driver: Any, button: str, text: str) -> None:
    """Presses ``button`` until ``text`` stays the same."""
    before = None
    while (now := driver.find_element("id", text).text) != before:
        before = now
        driver.find_element("id", button).click()


def save(driver: Any, path: Path) -> None:
    picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    path.write_bytes(base64.b64decode(picture["data"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pages"), help="below the repository")
    parser.add_argument(
        "--figures", type=Path, default=Path("docs/figures/pages"), help="below the repository"
    )
    options = parser.parse_args(arguments)
    os.chdir(ROOT)  # the pages show the runs' paths
    problems = take_pictures(train_runs(options.runs), options.figures)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
