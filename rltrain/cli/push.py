"""``rltrain push`` and ``rltrain export``: a run's model on the Hub, or in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rltrain.build.publication import find_model, publication_of, push_model
from rltrain.errors import user_mistakes


def push_command(folder: Path, repository: str, *, private: bool, dry_run: bool) -> int:
    """``rltrain push``. With ``dry_run`` it prints the card and the files, and asks the Hub nothing."""
    console = Console(highlight=False)

    def report(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with user_mistakes():
        model = find_model(folder)
        report(f"{model.folder} -> {repository} ({'private' if private else 'public'})")
        if not dry_run:
            report(str(push_model(model, repository, private=private, report=report)))
            return 0
        publication = publication_of(model, repository)
        for name, content in sorted(publication.files.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            report(f"{size:>14,} bytes  {name}")
        card = publication.files.get("README.md")
        if isinstance(card, bytes):
            report(f"\n{card.decode()}")
    return 0


def export_command(folder: Path, out: Path, checkpoint: str | None, precision: str) -> int:
    """``rltrain export``: the model in ``folder`` or one of its checkpoints as the new folder ``out``."""
    from rltrain.build.exported import export_run

    with user_mistakes():
        written = export_run(folder, out, checkpoint, precision)
    Console(highlight=False).print(str(written), markup=False, soft_wrap=True)
    return 0
