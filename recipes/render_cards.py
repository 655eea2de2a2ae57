"""
Make model cards from results folders of `recipes/sft.py`, each with its pictures made small, into `model_cards/`.

python recipes/render_cards.py results/tiny-cpu/mixtral    # model_cards/tiny-mixtral/{README.md, loads.png, curves.png}

A card shows an unbalanced run too if the folder holds one (`--compare_unbalanced true` or `--baseline_dir` of `recipes/sft.py`), and
the results of `recipes/evaluate.py`.
"""

import argparse
import io
from pathlib import Path

from hf_phibalance.files import replace_unprintable


TARGET = Path(__file__).parent.parent / "model_cards"
LARGEST_PICTURE = 60_000  # bytes


def main(args):
    from hf_phibalance.hub import Run, draw, model_card, pictures_in

    for folder in args.folders:
        run, baseline = Run.load(folder), Run.load_baseline(folder)
        title = f"{args.prefix}{folder.resolve().name}"  # "." has no name
        target = args.target / title
        target.mkdir(parents=True, exist_ok=True)
        draw(target, run, baseline, dpi=args.dpi)
        for name in pictures_in(target):
            shrink(target / name)
        model_card(run, baseline, title=title, pictures=pictures_in(target)).save(target / "README.md")
        sizes = ", ".join(f"{path.name} {path.stat().st_size / 1000:.0f} kB" for path in sorted(target.iterdir()))
        print(f"{target}: {sizes}")


def shrink(path):
    """Reduces the number of colours in a picture, to make the file smaller."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    for colours in (128, 64, 32):
        content = io.BytesIO()
        picture.quantize(colours).save(content, "PNG", optimize=True)
        if content.tell() < LARGEST_PICTURE:
            break
    path.write_bytes(content.getvalue())


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="results folders")
    parser.add_argument("--target", type=Path, default=TARGET, help="where the cards go (default: model_cards/)")
    parser.add_argument("--prefix", default="tiny-", help="put before the folder's name (default: tiny-)")
    parser.add_argument("--dpi", type=int, default=110, help="resolution of the pictures (default: 110)")
    return parser


if __name__ == "__main__":
    replace_unprintable()
    main(make_parser().parse_args())
