# docker build -t depth-distill .                              for CPUs
# docker build -t depth-distill --build-arg TORCH=cuda .       with CUDA, as PyPI's torch brings it
# docker run --rm -v "$PWD:/work" depth-distill predict photo.jpg
# docker run --rm --gpus all --shm-size=8g -v "$PWD:/work" depth-distill train own.toml
FROM python:3.12-slim

ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/depth-distill
COPY constraints.txt ./
# Torch first and apart: gigabytes that no change of this project loads again.
RUN if [ "$TORCH" = cpu ]; then index=https://download.pytorch.org/whl/cpu; else index=https://pypi.org/simple; fi \
    && pip install --index-url "$index" -c constraints.txt torch torchvision
COPY . .
RUN pip install -c constraints.txt '.[demo,teachers,export]' \
    && useradd --create-home --uid 1000 distill \
    && mkdir /work \
    && chown distill /work

USER 1000
WORKDIR /work
ENTRYPOINT ["distill"]
CMD ["--help"]
