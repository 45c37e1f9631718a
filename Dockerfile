# One image for both services of compose.yaml. EXTRAS selects the engines:
#   demo      espeak-ng alone, small, for any CPU
#   demo,gpu  Qwen3-TTS as well (torch with CUDA 13, several GB; the host needs NVIDIA driver 580 or newer)
# With cluster beside them, the image is for .github/kubernetes/rayservice.yaml: it has Ray.
FROM python:3.12-slim

ARG EXTRAS=demo,gpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# The worker refuses a socket directory that other users can open. A new volume takes its owner and mode from here.
RUN useradd --create-home --uid 10001 tts \
    && install --directory --owner=tts --mode=0700 /run/tts \
    && install --directory --owner=tts /data/models /data/voices /data/usage \
    && install --directory --owner=tts --mode=0700 /data/audio

# Triton compiles a launcher for its kernels at the first load. Without a C compiler, torch's kernels are taken.
RUN case ",${EXTRAS}," in *,gpu,*) apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* ;; esac

# KubeRay's probes call wget.
RUN case ",${EXTRAS}," in *,cluster,*) apt-get update \
    && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/* ;; esac

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY gpu_worker gpu_worker
COPY server server
COPY models/*.toml models/
RUN pip install --editable ".[${EXTRAS}]"

USER tts
# In a container 0.0.0.0 is reachable through the published ports only.
ENV TTS_HOST=0.0.0.0 TTS_MODELS_DIR=/data/models TTS_VOICES_DIR=/data/voices TTS_AUDIO_STORE_DIR=/data/audio \
    TTS_USAGE_FILE=/data/usage/usage.sqlite
EXPOSE 8000
# By default the whole service runs in one container; compose.yaml runs its two processes in containers of their own.
CMD ["python", "-m", "server"]
