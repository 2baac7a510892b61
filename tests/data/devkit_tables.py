"""A program that reads a folder with nuscenes-devkit, for a Python that has it: boxes and projections, as JSON."""

import json
import sys

from nuscenes.nuscenes import NuScenes
from nuscenes.utils.geometry_utils import view_points


def main(folder: str) -> None:
    nusc = NuScenes("v1.0-mini", folder, verbose=False)
    found = {}
    for sample in nusc.sample:
        _, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        _, in_camera, intrinsics = nusc.get_sample_data(sample["data"]["CAM_FRONT"])
        seen = {box.token: view_points(box.center[:, None], intrinsics, normalize=True)[:2, 0] for box in in_camera}
        found[sample["token"]] = {
            box.token: {
                "name": box.name,
                "center": box.center.tolist(),
                "wlh": box.wlh.tolist(),
                "yaw": box.orientation.yaw_pitch_roll[0],
                "velocity": nusc.box_velocity(box.token).tolist(),
                "pixel": seen[box.token].tolist() if box.token in seen else None,
            }
            for box in boxes
        }
    json.dump(found, sys.stdout)


main(sys.argv[1])
