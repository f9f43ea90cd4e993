"""Write a noisy label file for the training images of a data set.

The labels are those of a run with one `--noise RATE --noise-type TYPE --noise-seed SEED` on all training images, so a
file fixes them for other people and other programs; the scripts read it with --labels. Files of several rates share one
seed: their noise is not independent. `jointgan.py --noise R1 R2` draws each label set with a seed of its own: to write
the same sets, run this once for each rate, with --seed 1, then --seed 2, and so on.

    python inject_noise.py --data toy --noise 0.2 --seed 1                    # noise-toy-symmetric-0.2-s1.csv and .json
    python inject_noise.py --data raf --noise 0.1 0.2 0.3 --seed 1            # three files, one for each rate
    python inject_noise.py --data toy --noise 0.2 0.3 0.4 --vote --seed 1     # one file: the majority of three sets
    python cocuring.py --data toy --labels noise-toy-symmetric-0.2-s1.csv     # the labels of --noise 0.2 --noise-seed 1

With --from-checkpoint the labels are the predictions of a trained model (machine labels, as in "Facial Emotion
Recognition with Noisy Multi-task Annotations", Sec. 5.2), with valence and arousal in a second file where the model
has them.

    python inject_noise.py --data raf --root data/raf --from-checkpoint runs/jointgan-affectnet-n0-s1/model.pt
"""

import argparse
import json
import sys
from pathlib import Path

from support.datasets import decode_all, inject, load_train_index, write_labels, write_va
from support.distributed import reports_errors
from support.inference import load_model
from support.label_sets import majority_vote, noisy_sets
from support.runs import Parser, add_index_args, check_data_args

import torch

from common import UserError, find_device, write_atomically


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_index_args(parser, several=True)
    add = parser.add_argument_group("what is written").add_argument
    add("--from-checkpoint", metavar="MODEL", help="machine labels: what a trained model.pt of any method predicts, "
        "classes matched by name; excludes --noise")
    add("--device", default="auto", help="for --from-checkpoint: cpu, cuda, ...; auto: cuda if there is one")
    add("--cache", default="cache", metavar="DIR", help="for --from-checkpoint: where decoded images are kept")
    add("--output", metavar="FILE", help="what to write, .csv or .txt (default: noise-<data>-<type>-<rate>-s<seed>, "
        "or machine-<data>-<run>); with several rates the rate is added before the suffix: x.csv becomes x-0.1.csv, "
        "x-0.2.csv; a .json with what was done comes beside each file")
    add("--vote", action="store_true", help="one file: the majority label of the label sets that jointgan.py makes of "
        "these rates; in a tie the label of the earliest set")
    add("--format", choices=("csv", "list"), default="csv", help="csv: name,label with class names; list: RAF-DB's "
        "own, labels counted from 1")
    add("--overwrite", action="store_true", help="replace files that are there")
    early = parser.parse_early(argv)
    parser.set_defaults(root=f"data/{early.data}", noise_seed=early.seed, labels=None, split="test")
    args = parser.parse_args(argv)
    check_data_args(args, parser)
    if args.vote and len(args.noise) < 2:
        parser.error("--vote: the majority of several label sets, it needs several rates of --noise")
    if not args.vote and len({f"{rate:g}" for rate in args.noise}) < len(args.noise):
        parser.error("--noise: the same rate twice, to six digits; each rate gives one file")
    if args.output and (Path(args.output).suffix not in (".csv", ".txt") or not Path(args.output).parent.is_dir()):
        parser.error(f"--output {args.output}: a file name that ends in .csv or .txt, in a folder that is there")
    return args


def output_of(args, rate: float) -> Path:
    """The label file of one rate; with --from-checkpoint or --vote the only one."""
    if args.output:
        path = Path(args.output)
        return path.with_stem(f"{path.stem}-{rate:g}") if len(args.noise) > 1 and not args.vote else path
    suffix = ".csv" if args.format == "csv" else "-list.txt"
    if args.from_checkpoint:
        return Path(f"machine-{args.data}-{Path(args.from_checkpoint).resolve().parent.name}{suffix}")
    rates = "-".join(f"{rate:g}" for rate in args.noise) if args.vote else f"{rate:g}"
    return Path(f"{'vote' if args.vote else 'noise'}-{args.data}-{args.noise_type}-{rates}-s{args.noise_seed}{suffix}")


def transition_matrix(clean: torch.Tensor, noisy: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts, int64 (C, C): row the clean label, column the noisy one. clean, noisy: int64 (N,)."""
    return torch.bincount(clean * num_classes + noisy, minlength=num_classes**2).view(num_classes, num_classes)


def machine_labels(index, args) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the model predicts: int64 (N,), in the classes of the data set; valence and arousal (N, 2) or None.

    Raises UserError for a model that shares fewer than two classes with the data set.
    """
    state, predictor = load_model(args.from_checkpoint, find_device(args.device))
    shared = [k for k, name in enumerate(state["classes"]) if name in index.classes]
    if len(shared) < 2:
        raise UserError(f"{args.from_checkpoint}: its classes ({', '.join(state['classes'])}) are not those of "
                        f"--data {args.data} ({', '.join(index.classes)})")
    for missing in index.classes:
        if missing not in state["classes"]:
            print(f"the model does not know the class {missing}: no image will be labelled so")
    args.size = state["args"]["size"]
    probs, va = predictor(decode_all(index, args, "train"))
    to_data = torch.tensor([index.classes.index(state["classes"][k]) for k in shared])
    return to_data[probs[:, shared].argmax(1)], va


def write_files(output: Path, index, noisy: torch.Tensor, clean: torch.Tensor, va, how: dict, args) -> None:
    """The label file, its .json, the file of valence and arousal if there are any; the counts on the screen.

    noisy, clean: int64 (N,). va: (N, 2) or None. how: what the .json says of where the labels come from.
    """
    counts = transition_matrix(clean, noisy, len(index.classes))
    per_class = []
    for c, (name, row) in enumerate(zip(index.classes, counts)):
        shares = [round(share, 6) for share in (row / row.sum().clamp(min=1)).tolist()]
        images, kept = int(row.sum()), int(row[c])
        per_class.append({"class": name, "images": images, "changed": images - kept, "transition": shares})
    record = {"data": args.data, "root": str(args.root), "images": len(noisy), **how}
    record |= {"limit": args.limit, "difficulty": args.difficulty}
    record |= {"changed": int((noisy != clean).sum()), "columns": list(index.classes), "classes": per_class}
    write_labels(output, index.names, noisy, index.classes, args.format)
    note, va_output = files_beside(output)
    if va is not None:
        write_va(va_output, index.names, va)
    write_atomically(note, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))

    width, columns = max(map(len, index.classes)), [max(6, len(name)) for name in index.classes]
    names = "  ".join(f"{name:>{n}}" for name, n in zip(index.classes, columns))
    print(f"{'from / to':{width}}  {names}   changed")
    for entry in per_class:
        cells = "  ".join(f"{share:{n}.3f}" for share, n in zip(entry["transition"], columns))
        print(f"{entry['class']:{width}}  {cells}   {entry['changed']} of {entry['images']}")
    beside = note.name if va is None else f"{note.name} and {va_output.name}"
    changed = f"{record['changed']:,} of {record['images']:,} labels changed"
    print(f"{output}: {changed} ({record['changed'] / record['images']:.2%}); {beside} beside it")


def files_beside(output: Path) -> tuple[Path, Path]:
    """The .json of a label file, and the file of valence and arousal."""
    return output.with_suffix(".json"), output.with_name(f"{output.stem}-va.csv")


@reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    rates = any(args.noise) if args.vote else all(args.noise)
    if rates == bool(args.from_checkpoint) or (args.from_checkpoint and any(args.noise)):
        raise UserError("either --noise RATE is needed, in (0, 1), or --from-checkpoint MODEL")
    outputs = [output_of(args, rate) for rate in (args.noise[:1] if args.vote else args.noise)]
    for output in outputs:
        note, va_output = files_beside(output)
        for file in (output, note, *([va_output] if args.from_checkpoint else [])):
            if file.exists() and not args.overwrite:
                raise UserError(f"{file} is there already: --overwrite replaces it, --output FILE writes another")
    index, own, _ = load_train_index(argparse.Namespace(**vars(args) | {"noise": 0}))
    if args.from_checkpoint:
        labels, va = machine_labels(index, args)
        write_files(outputs[0], index, labels, own, va, {"checkpoint": args.from_checkpoint}, args)
        if va is None:
            files_beside(outputs[0])[1].unlink(missing_ok=True)  # of the labels that were replaced
        return 0
    if args.vote:
        voted = majority_vote(noisy_sets(own, index.classes, args), len(index.classes))
        how = {"vote": args.noise, "type": args.noise_type, "seed": args.noise_seed}
        write_files(outputs[0], index, voted, own, None, how, args)
        return 0
    for rate, output in zip(args.noise, outputs):
        noisy = inject(own, index.classes, rate, args.noise_type, args.noise_seed)
        how = {"rate": rate, "type": args.noise_type, "seed": args.noise_seed}
        write_files(output, index, noisy, own, None, how, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
