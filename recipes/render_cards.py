"""
Make model cards from results folders of `recipes/sft.py`, each with its pictures made small, into `model_cards/`.

# One card: model_cards/tiny-mixtral/{README.md, loads.png, curves.png}
python recipes/render_cards.py results/tiny-cpu/mixtral

# Beside a run without balancing, and with the balance of the untrained model
python recipes/sft.py --config recipes/tiny-cpu/mixtral.yaml --balance false --output_dir results/tiny-cpu/mixtral-unbalanced
python recipes/sft.py --config recipes/tiny-cpu/mixtral.yaml --max_steps 1 --learning_rate 0 \
    --output_dir results/tiny-cpu/mixtral-untrained
python recipes/render_cards.py results/tiny-cpu/mixtral

Of a results folder `<name>`, `<name>-unbalanced` is shown beside it if it lies there, and `<name>-untrained`, a run that
learnt nothing, gives the balance before training if the run itself did not measure it.
"""

import argparse
import io
from pathlib import Path


TARGET = Path(__file__).parent.parent / "model_cards"
RECIPES = Path(__file__).parent / "tiny-cpu"
LARGEST_PICTURE = 60_000  # bytes; a card of a tiny model should not outweigh the code


def main(args):
    from hf_phibalance.publishing import SUMMARY_NAME, Run, draw, model_card, pictures_in

    for folder in args.folders:
        run, baseline = Run.load(folder), Run.load_baseline(folder)
        unbalanced, untrained = (folder.with_name(f"{folder.name}-{kind}") for kind in ("unbalanced", "untrained"))
        if baseline is None and (unbalanced / SUMMARY_NAME).is_file():
            baseline = Run.load(unbalanced)
        if "before" not in run.summary and (untrained / SUMMARY_NAME).is_file():
            run.note_before(before_training(Run.load(untrained), run, untrained))
        run.summary.setdefault("command", recipe_command(folder, run))
        title = f"{args.prefix}{folder.name}"
        target = args.target / title
        target.mkdir(parents=True, exist_ok=True)
        draw(target, run, baseline, dpi=args.dpi)
        for name in pictures_in(target):
            shrink(target / name)
        card = model_card(run, baseline, title=title, pictures=pictures_in(target))
        card.save(target / "README.md")
        sizes = ", ".join(f"{path.name} {path.stat().st_size / 1000:.0f} kB" for path in sorted(target.iterdir()))
        print(f"{target}: {sizes}")


def before_training(untrained, run, folder):
    """The held-out balance of the untrained model, from a run of the same recipe that learnt nothing."""
    same = ("model_type", "parameters", "seed", "dataset", "problems")
    differs = [key for key in same if untrained.summary.get(key) != run.summary.get(key)]
    rates = {entry["learning_rate"] for entry in untrained.log_history if "learning_rate" in entry}
    if differs or rates != {0}:
        raise ValueError(
            f"{folder} is no untrained twin ({', '.join(differs) or f'learning rates {sorted(rates)}'} differ): make it by "
            "the same recipe with --max_steps 1 --learning_rate 0, or remove it."
        )
    return next(entry for entry in reversed(untrained.log_history) if "test_moe/max_vio" in entry)


def recipe_command(folder, run):
    """The command of a run that is exactly a recipe's, for results that do not say it themselves; else `None`."""
    import yaml

    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        balance = run.summary["balance"] or {}
        found = (folder.as_posix(), run.summary["steps"], run.summary["seed"], balance.get("coef"))
        if found == tuple(recipe.get(key) for key in ("output_dir", "max_steps", "seed", "coef")):
            return f"python recipes/sft.py --config recipes/{RECIPES.name}/{path.name}"
    return None


def shrink(path):
    """Fewer colours, which is most of a PNG's size."""
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
    main(make_parser().parse_args())
