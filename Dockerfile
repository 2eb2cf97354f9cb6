# dsrl_async with CUDA and LIBERO, for a machine with an NVIDIA GPU. Not built or run by the project yet.
#
#   docker build --tag dsrl_async .
#   docker run --rm --gpus all --volume "$PWD/runs:/home/dsrl/runs" dsrl_async \
#       dsrl-launch --config libero_spatial_pi0 --policy.checkpoint /home/dsrl/runs/pi0
#
# torch's wheel brings CUDA's libraries, so a plain image will do; the driver and NVIDIA's EGL come from the host.
FROM ubuntu:24.04

# libegl1 finds the vendor's EGL; Mesa's draws where there is no GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates libegl-mesa0 libegl1 libgl1-mesa-dri python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# graphics: EGL for MuJoCo's cameras; compute and utility: CUDA and NVML.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics \
    MUJOCO_GL=egl \
    PATH=/opt/dsrl/bin:$PATH

COPY scripts/constraints.txt /tmp/constraints.txt
RUN python3 -m venv /opt/dsrl && pip install --no-cache-dir --constraint /tmp/constraints.txt torch
COPY . /tmp/dsrl_async
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt "/tmp/dsrl_async[cuda,libero,openpi,video]" \
    && useradd --create-home --uid 1001 dsrl
USER 1001
WORKDIR /home/dsrl
ENTRYPOINT ["tini", "--"]
CMD ["dsrl-doctor"]
