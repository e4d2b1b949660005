# The page and the HTTP API on a CPU, with the model that ships:
#   docker build -t cmmasksd . && docker run --rm -p 8000:8000 cmmasksd
# Another model: docker run -v ./runs/mine/best:/model:ro -p 8000:8000 cmmasksd --model /model

FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7 AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7
# torch from its own index: the build for CPUs is a fifth of the one with CUDA
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.14"
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[serve]"
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v1/health', timeout=4)"]
ENTRYPOINT ["cmmasksd", "serve", "--host", "0.0.0.0", "--port", "8000"]
