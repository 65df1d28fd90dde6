# The commands without an engine: to submit manifests and inspect jobs.
#   docker build -f docker/producer.Dockerfile -t inpaint-producer .
FROM python:3.13-slim AS build
WORKDIR /source
RUN python -m venv /opt/inpaint
COPY LICENSE README.md pyproject.toml ./
COPY producer producer
COPY workers workers
COPY shared shared
COPY migrations migrations
RUN /opt/inpaint/bin/pip install --no-cache-dir .

FROM python:3.13-slim
RUN useradd --uid 10001 --create-home inpaint
COPY --from=build /opt/inpaint /opt/inpaint
ENV PATH=/opt/inpaint/bin:$PATH PYTHONUNBUFFERED=1
USER inpaint
WORKDIR /data
CMD ["inpaint-submit", "--help"]
