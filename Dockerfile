# mmdet with its operators for the CPU and mmdet_ema, for those who do not want
# to compile on their own machine:
#
#   docker build -t mmdet_ema . && docker run -it mmdet_ema
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /mmdet_ema
# what changes seldom first: the packages and mmcv's operators stay cached
COPY Makefile ./
COPY environments environments
RUN make .venv-newest/.openmmlab && rm -rf ~/.cache
COPY . .
RUN make setup
ENV PATH=/mmdet_ema/.venv-newest/bin:$PATH
CMD ["bash"]
