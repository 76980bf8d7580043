# clipdeploy beside NVIDIA's TensorRT; docs/docker.md has the commands.
#
#     docker build -t clipdeploy .
#     docker run --rm --gpus all -v "$PWD:/work" clipdeploy doctor
#
# 25.10 has TensorRT 10.13.3.9, as the Triton server of the same month
# (clipdeploy/data/triton_servers.csv): such a server loads the engines that are built here.
ARG RELEASE=25.10
FROM nvcr.io/nvidia/tensorrt:${RELEASE}-py3

# The image's Python is the system's, and pip refuses to install into it without this setting. A list of
# versions that the image may have for pip holds for NVIDIA's packages, not for these.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1

WORKDIR /src
COPY pyproject.toml setup.cfg constraints.txt README.md LICENSE ./
COPY exporters exporters
COPY calibration calibration
COPY clipdeploy clipdeploy
# Without the extra "tensorrt": TensorRT is the image's.
RUN python3 -m pip install -c constraints.txt . \
    && python3 -c "import sys, tensorrt; assert sys.version_info >= (3, 11); print(tensorrt.__version__)"

# Any user may write here, so that `docker run --user` works.
ENV HOME=/cache CLIPDEPLOY_HOME=/cache/clipdeploy
RUN mkdir -m 1777 /cache
WORKDIR /work
# Instead of the image's entry point, which prints a banner on stdout.
ENTRYPOINT ["clipdeploy"]
CMD ["--help"]
