# SPDX-License-Identifier: Apache-2.0
"""`ftkd synth` and `ftkd convert`: data sets in the nuScenes format and bags made of them."""

from pathlib import Path

import click

from ftkd_ros.commands import options


@click.command(short_help="Write synthetic driving scenes as a nuScenes data set.")
@options.folder("--output", "New folder of the data set.")
@click.option("--version", default="v1.0-synth", help="Name of the folder with the tables.")
@click.option("--split", default="held_out", help="Split that the scenes belong to.")
@click.option("--scenes", type=int, default=1, metavar="N", help="Number of scenes.")
@click.option("--first-seed", type=int, default=900_000, metavar="SEED", help="Seed of the first scene.")
@click.option("--duration", type=float, default=20.0, metavar="S", help="Seconds per scene.")
@click.option(
    "--size", callback=options.optional_size, metavar="WxH",
    help="Width and height of the images.  [default: 800 wide, with the aspect of the rig]",
)  # fmt: skip
@click.option(
    "--rig",
    default="nuscenes",
    help="nuscenes, autoware_sensor_kit, truck, shuttle_fisheye, five_cameras, or varied: one per scene.",
)
@click.option("--world", default="ordinary", help="ordinary, or traffic: dense and moving.")
def synth(
    output: Path,
    version: str,
    split: str,
    scenes: int,
    first_seed: int,
    duration: float,
    size: tuple[int, int] | None,
    rig: str,
    world: str,
) -> int:
    """Render driving scenes and write them as a data set that the nuScenes devkit loads.

    A scene has the cameras of a rig at 12 Hz, lidar key frames and ground truth. The same seed gives the
    same scene.
    """
    from ftkd_core.data.synthetic.export import DEFAULT_WIDTH, run_synth

    written = run_synth(
        output=output,
        scenes=scenes,
        first_seed=first_seed,
        version=version,
        split=split,
        width=size[0] if size else DEFAULT_WIDTH,
        height=size[1] if size else None,
        duration_s=duration,
        world=world,
        rig=rig,
    )
    print(f"wrote {written}")
    return 0


@click.command(short_help="Write nuScenes scenes as rosbag2 (MCAP) that any ROS 2 tool plays.")
@options.dataset
@click.option("--scene", multiple=True, help="Scene (scene-0061); several times, or all.  [default: all]")
@click.option("--split", help="Convert the scenes of a split.")
@options.folder("--output", "New bag of one named scene; else the folder of one bag per scene.")
@click.option("--sweeps", is_flag=True, help="Write all images (12 Hz), not only key frames (2 Hz).")
@click.option("--lidar", is_flag=True, help="Write lidar sweeps as PointCloud2.")
@click.option("--radar", is_flag=True, help="Write radar sweeps as PointCloud2.")
@click.option("--map", "with_map", is_flag=True, help="Write the map around the drive as OccupancyGrid.")
@click.option("--can", is_flag=True, help="Write the messages of the CAN bus expansion.")
@options.category_map
@click.option("--jobs", type=click.IntRange(1), default=2, metavar="N", help="Scenes at the same time.")
@options.ray_address
def convert(
    dataroot: Path,
    version: str,
    scene: tuple[str, ...],
    split: str | None,
    output: Path,
    sweeps: bool,
    lidar: bool,
    radar: bool,
    with_map: bool,
    can: bool,
    category_map: tuple[str, ...],
    jobs: int,
    ray: str,
) -> int:
    """Write nuScenes scenes as rosbag2 (MCAP). Needs no ROS.

    A bag holds the original camera JPEGs, camera_info, /tf, /tf_static, /odom, the ground truth and the
    sample token of each key frame. Lidar, radar, map and CAN bus are optional; a note reports what is
    absent. Several scenes: finished bags of an earlier run are kept.
    """
    from ftkd_core.data.nuscenes import parse_category_map
    from ftkd_ros.bag.convert import convert_opened
    from ftkd_ros.bag.convert_extras import Extras
    from ftkd_ros.bag.convert_scenes import ALL_SCENES, choose_scenes, convert_scenes
    from ftkd_ros.bag.io import check_new

    one = len(scene) == 1 and scene[0] != ALL_SCENES and split is None
    if one:
        check_new(output)
    dataset = options.open_dataset(dataroot, version, category_map)
    extras = Extras(lidar=lidar, radar=radar, map=with_map, can=can)
    if one:
        summary = convert_opened(dataset, scene[0], output, sweeps=sweeps, extras=extras)
        print("\n".join([str(summary), *(f"note: {note}" for note in summary.notes)]))
        return 0
    chosen = choose_scenes(dataset, scene, split)
    mapping = parse_category_map(category_map) if category_map else None
    report = convert_scenes(
        dataset, chosen, output, sweeps=sweeps, extras=extras, jobs=jobs, ray=ray, category_map=mapping
    )
    print(f"{output}: {report}")
    report.check()
    return 0


@click.command("export-nuscenes", short_help="Write bags as a data set in the nuScenes layout.")
@click.option(
    "--bag", "bags", type=options.PATH, multiple=True, required=True, metavar="BAG",
    help="Bag that becomes a scene; several times.",
)  # fmt: skip
@click.option(
    "--detections", type=options.PATH, multiple=True, metavar="BAG",
    help="Detections of each bag, as annotations.  [default: the ground truth of the bag, if any]",
)  # fmt: skip
@options.folder("--output", "New folder of the data set.")
@click.option("--version", default="v1.0-bag", help="Name of the folder with the tables.")
@click.option("--split", default="exported", help="Name of the split of all scenes.")
@click.option(
    "--key-interval", type=float, default=0.5, metavar="S",
    help="Seconds between key frames of a bag without /sample_token.",
)  # fmt: skip
@click.option(
    "--min-score", type=float, default=0.3, metavar="S", help="Leave out detections that score lower."
)
@options.node_parameters
def export_nuscenes(
    bags: tuple[Path, ...],
    detections: tuple[Path, ...],
    output: Path,
    version: str,
    split: str,
    key_interval: float,
    min_score: float,
    params_files: tuple[Path, ...],
    assignments: tuple[str, ...],
) -> int:
    """Write camera images, calibration, ego poses and objects of bags as a data set that can be labelled,
    trained on and scored.

    Images are unchanged; raw and distorted ones become rectified PNG files. Topics and frames are parameters
    of the node, as for `ftkd detect`.
    """
    from ftkd_ros.bag.export_nuscenes import ExportOptions, export_bags

    chosen = ExportOptions(
        version=version,
        split=split,
        key_interval_s=key_interval,
        min_score=min_score,
        parameters=options.read_node_parameters(params_files, assignments),
    )
    summary = export_bags(bags, output, detections=detections, options=chosen)
    print(summary)
    for fault, count in summary.faults.items():
        print(f"note: {count} x {fault}")
    return 0


@click.command("check-data", short_help="Check the tables and all images of a nuScenes data set.")
@options.dataset
@options.category_map
def check_data(dataroot: Path, version: str, category_map: tuple[str, ...]) -> int:
    """Check a data set before conversion or training.

    Lists images that are missing or cut off and annotations that are left out. Exit code 2 if an image
    cannot be used.
    """
    from ftkd_core.data.nuscenes import faults_text, find_faults
    from ftkd_core.errors import UserError

    dataset = options.open_dataset(dataroot, version, category_map)
    images = [row["filename"] for row in dataset.sample_data if row["sensor_modality"] == "camera"]
    faults = find_faults(Path(dataset.dataroot), images)
    for name, problem in faults.items():
        print(f"{name} {problem}")
    print(
        f"{len(dataset.scene)} scenes, {len(dataset.sample)} key frames, {len(images)} images, "
        f"{len(dataset.sample_annotation)} annotations"
    )
    if faults:
        raise UserError(f"data set {str(dataroot)!r}: {faults_text(faults, len(images))}; copy them again")
    return 0
