#!/bin/sh
# vLLM's OpenAI-compatible server, in which every layer and head of a request holds about BUDGET tokens.
#
#   sh examples/serve_vllm.sh [MODEL [options of `vllm serve`]]
#   POLICY=keydiff BUDGET=2048 sh examples/serve_vllm.sh meta-llama/Llama-3.1-8B-Instruct --port 8001
#   curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
#       -d '{"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "prompt": "The capital of France is", "max_tokens": 8}'
#
# Needs kvevict[vllm]: vLLM finds the plugin by itself. What can be set, and what is refused: docs/vllm.md.
set -eu
MODEL=${1:-HuggingFaceTB/SmolLM2-135M-Instruct}
[ $# -eq 0 ] || shift
exec vllm serve "$MODEL" \
    --additional-config "{\"kvevict\": {\"policy\": \"${POLICY:-recommended}\", \"budget\": ${BUDGET:-1024}}}" "$@"
