# The one image of the project: services of the platform, sweeper, fault agents and helper jobs differ by command alone.
# Without a container engine: manifests/platform/build-image.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
# Dependencies are a layer of their own: a change of the code leaves it as it is.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
 && pip install --no-cache-dir --constraint constraints.txt --prefix /install --requirement requirements.txt
COPY README.md LICENSE definitions.py ./
COPY mlchaos_dagster mlchaos_dagster
RUN pip install --no-cache-dir --no-deps --prefix /opt/mlchaos/install .

FROM python:3.11-slim-bookworm
# iptables, ipset, iproute2: network faults; stress-ng, procps: CPU and memory faults; tini: signals reach a Python that is
# PID 1, and nobody is left a zombie.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends curl iproute2 ipset iptables procps stress-ng tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mlchaos
COPY --from=build /install /usr/local
COPY --from=build /opt/mlchaos/install /usr/local
COPY definitions.py /opt/mlchaos/definitions.py
# Fault agents are started as root with the one capability they need; everything else never is.
USER 10001:10001
WORKDIR /opt/mlchaos
ENTRYPOINT ["tini", "--"]
CMD ["mlchaos", "--help"]
