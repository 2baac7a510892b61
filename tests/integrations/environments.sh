#!/usr/bin/env bash
# Tests the integrations with the packages themselves, in environments of their own: they do not agree with one another.
# Each sees the packages of the project's environment, PyTorch among them, and has the versions of constraints-clients.txt.
#
#   tests/integrations/environments.sh PYTHON [NAME...]
#
# PYTHON is that of the project's environment. NAMEs are some of the functions below; all of them by default.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$1
shift
mkdir -p build/clients
echo "torch==$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')" >build/clients/torch.txt

# environment NAME: makes it, unless it is there.
environment() {
    env=build/clients/$1
    [ -d "$env" ] || "$python" -m venv "$env"
    "$python" -c 'import site; print(site.getsitepackages()[0])' >"$(echo "$env"/lib/python*/site-packages)/project.pth"
}

install() {
    "$env/bin/python" -m pip install --quiet --constraint constraints-clients.txt --constraint build/clients/torch.txt "$@"
}

# run WORDS [OPTION...]: the tests whose names hold one of these words; that any was run, not skipped, is seen to.
run() {
    HF_HUB_OFFLINE=1 "$env/bin/python" -m pytest -p no:xdist -q tests/integrations -k "$1" "${@:2}" --junit-xml "$env/tests.xml"
    "$env/bin/python" - "$env/tests.xml" <<'CODE'
import sys
import xml.etree.ElementTree

suite = next(xml.etree.ElementTree.parse(sys.argv[1]).iter("testsuite"))
if int(suite.get("tests")) == int(suite.get("skipped")):
    sys.exit("every test was skipped: the package is not there")
CODE
}

transformers() {
    install transformers kernels
    run "test_transformers or kernels"
}

transformers_whole() {
    install transformers
    run test_whole_models -m slow
}

transformers_newest() {
    install transformers
    "$env/bin/python" -m pip install --quiet --no-deps transformers==5.24.0
    run "test_transformers or (test_whole_models and pp_doclayout_v4)" -m "slow or not slow"
}

ultralytics() {
    install torchvision opencv-python-headless matplotlib requests psutil pyyaml
    install --no-deps ultralytics
    run ultralytics
}

rfdetr() {
    install torchvision transformers requests supervision opencv-python-headless pydeprecate
    install --no-deps rfdetr
    run rfdetr
}

groundingdino() {
    install torchvision timm transformers addict yapf opencv-python-headless pycocotools
    install --no-deps groundingdino-py
    run groundingdino
}

mmcv_lite() {
    install mmengine addict yapf opencv-python-headless
    install --no-deps mmcv-lite
    run mmcv
}

onedl_mmcv() {
    install mmengine addict yapf opencv-python-headless
    install --no-deps onedl-mmcv
    run mmcv
}

dfine() {
    install torchvision scipy pyyaml
    install --no-deps pydfine
    run dfine
}

libreyolo() {
    install torchvision requests pyyaml opencv-python-headless scipy tqdm
    install --no-deps libreyolo
    run libreyolo
}

if [ $# -eq 0 ]; then
    set -- transformers transformers_newest transformers_whole ultralytics rfdetr groundingdino mmcv_lite onedl_mmcv dfine libreyolo
fi
for name in "$@"; do
    echo "== $name"
    environment "$name"
    "$name"
done
