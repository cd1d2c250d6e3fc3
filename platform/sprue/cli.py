"""``sprue``: who is champion, why, and where a version comes from."""

import argparse
import hashlib
import logging
import sys
from pathlib import Path

from mlflow.exceptions import MlflowException

from sprue.data.labelled import LabelledSample, read_labelled
from sprue.errors import SprueError
from sprue.store import location
from sprue.tracking import trail
from sprue.tracking.aliases import crown, holder, reconcile, roll_back
from sprue.tracking.lineage import Lineage, describe, uses
from sprue.tracking.lock import class_lock
from sprue.tracking.promotion import Rules, measure
from sprue.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    RegisteredDetector,
    class_names,
    find_registered,
    load_detector,
)
from sprue.tracking.server import connect
from sprue.training.again import fit_again


def promote(arguments: argparse.Namespace) -> None:
    """Makes a version champion if it stands the test on the named pictures."""
    class_name = arguments.class_name
    challenger = find_registered(class_name, arguments.version)
    number = holder(class_name, CHAMPION)
    if number == challenger.version:
        raise SprueError(f"{class_name} version {challenger.version} is champion already")
    if arguments.force is not None:
        if not arguments.force.strip():
            raise SprueError("--force wants a reason")
        crown(class_name, challenger.version, number, "forced", arguments.force)
        print(f"{class_name}: version {challenger.version} is champion, by force")
        return
    if arguments.pictures is None:
        raise SprueError(
            "name pictures to decide on with --pictures: a folder with good ones in good/ and, if there are any, "
            "those of each defect in a folder beside it; or --force REASON"
        )
    champion = find_registered(class_name, str(number)) if number is not None else None
    detector = load_detector(challenger)
    samples = read_labelled(arguments.pictures, detector.views)
    for registered in (challenger, champion):
        if registered is not None:
            _require_new(samples, registered)
    evidence = measure(detector, load_detector(champion) if champion else None, samples)
    rules = Rules(margin=arguments.margin, latency_s=arguments.latency / 1000)
    print(f"{class_name}: version {challenger.version} against champion {number or 'none'}\n{evidence}")
    if evidence.drawn:
        print("there is no defective picture among them: the defects are drawn, and say less than real ones would")
    objections = evidence.objections(rules)
    if objections:
        with class_lock(class_name):
            current, reason = reconcile(class_name), "; ".join(objections)
            trail.record(class_name, "refused", current, current, reason, challenger.version, evidence.figures())
        raise SprueError(f"version {challenger.version} is not promoted: {reason}")
    crown(class_name, challenger.version, number, "promoted", str(evidence), evidence.figures())
    print(f"{class_name}: version {challenger.version} is champion")


def _require_new(samples: list[LabelledSample], registered: RegisteredDetector) -> None:
    """Refuses pictures that a version was made or measured with; see `promote`."""
    pictures = Lineage.read(registered).pictures
    split_of = dict(zip(pictures["sha256"], pictures["split"], strict=True))
    for sample in samples:
        for path in sample.paths:
            split = split_of.get(hashlib.sha256(path.read_bytes()).hexdigest())
            if split:
                raise SprueError(
                    f"{path} is a {split} picture of {registered.class_name} version {registered.version}; decide on "
                    "pictures that neither version has seen"
                )


def rollback(arguments: argparse.Namespace) -> None:
    """Goes back to the champion before."""
    version = roll_back(arguments.class_name, arguments.reason)
    print(f"{arguments.class_name}: version {version} is champion again")


def audit(arguments: argparse.Namespace) -> None:
    """Prints the trail, after looking for changes that were made elsewhere."""
    names = [arguments.class_name] if arguments.class_name else class_names()
    for name in names:
        with class_lock(name):
            reconcile(name)
    found = trail.entries(arguments.class_name)
    print("\n".join(map(str, found)) if found else "nothing has been decided yet")


def lineage(arguments: argparse.Namespace) -> None:
    """Prints where a version comes from, or what a picture was used for."""
    if arguments.picture:
        _print_uses(arguments.picture)
        return
    if not arguments.class_name:
        raise SprueError("name a class, or a file with --picture")
    registered = find_registered(arguments.class_name, arguments.version)
    if arguments.list:
        print(Lineage.read(registered).pictures.to_csv(index=False), end="")
        return
    for heading, words in describe(registered):
        print(f"{heading:<10} {words}")


def _print_uses(path: Path) -> None:
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SprueError(f"{path} can't be read: {error.strerror}") from error
    found, silent = uses(sha256)
    for use in found:
        print(f"{use.class_name} version {use.version} {' '.join(use.aliases):<10} {use.split:<12} {use.path}")
    if not found:
        print(f"no version knows {path}")
    if silent:
        print(f"without a record of their pictures: {', '.join(silent)}")


def retrain(arguments: argparse.Namespace) -> None:
    """Fits a version again, and says whether the weights are equal."""
    registered = find_registered(arguments.class_name, arguments.version)
    found = fit_again(registered, location(arguments.store), lambda epoch: print(epoch, flush=True))
    if found.equal:
        print(f"{registered.class_name} version {registered.version}: the weights are equal, bit for bit")
        return
    raise SprueError(
        f"{registered.class_name} version {registered.version}: the weights differ by up to {found.largest:.3g}; "
        "compare the commit, the packages and the machine that `sprue lineage` names with these here"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sprue", description=__doc__)
    parser.add_argument(
        "--store", default="store", help="folder or s3 URL of all results (default: %(default)s); MLFLOW_TRACKING_URI "
        "names the registry if it is a server",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("promote", help=promote.__doc__, description=promote.__doc__)
    command.add_argument("class_name", metavar="CLASS")
    command.add_argument("--version", default=CHALLENGER, help="its number or alias (default: %(default)s)")
    command.add_argument(
        "--pictures", type=Path, help="folder with good/ and a folder for each defect, seen by no version"
    )
    command.add_argument(
        "--margin", type=float, default=Rules.margin, help="how much lower its AUROC may be (default: %(default)s)"
    )
    command.add_argument(
        "--latency", type=float, default=1000 * Rules.latency_s, metavar="MS", help="a sample (default: %(default)g)"
    )
    command.add_argument("--force", metavar="REASON", help="promote without a test, and record why")
    command.set_defaults(run=promote)

    command = commands.add_parser("rollback", help=rollback.__doc__, description=rollback.__doc__)
    command.add_argument("class_name", metavar="CLASS")
    command.add_argument("--reason", required=True, help="is recorded")
    command.set_defaults(run=rollback)

    command = commands.add_parser("audit", help=audit.__doc__, description=audit.__doc__)
    command.add_argument("class_name", metavar="CLASS", nargs="?")
    command.set_defaults(run=audit)

    command = commands.add_parser("lineage", help=lineage.__doc__, description=lineage.__doc__)
    command.add_argument("class_name", metavar="CLASS", nargs="?")
    command.add_argument("--version", default=CHAMPION, help="its number or alias (default: %(default)s)")
    command.add_argument("--list", action="store_true", help="list the pictures, as CSV")
    command.add_argument("--picture", type=Path, metavar="FILE", help="say which versions were made with this picture")
    command.set_defaults(run=lineage)

    command = commands.add_parser("retrain", help=retrain.__doc__, description=retrain.__doc__)
    command.add_argument("class_name", metavar="CLASS")
    command.add_argument("--version", default=CHAMPION, help="its number or alias (default: %(default)s)")
    command.set_defaults(run=retrain)
    return parser


def main() -> None:
    """Runs a command; what goes wrong is one line and exit status 1."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        connect(location(arguments.store))
        arguments.run(arguments)
    except SprueError as error:
        sys.exit(f"sprue {arguments.command}: {error}")
    except MlflowException as error:
        sys.exit(f"sprue {arguments.command}: the registry answers: {error}")
    except OSError as error:
        sys.exit(f"sprue {arguments.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"sprue {arguments.command}: interrupted")


if __name__ == "__main__":
    main()
