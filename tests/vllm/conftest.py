"""These tests need vLLM, which has an environment of its own: `make test-vllm`. Elsewhere they are not collected."""

import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
# Read when vLLM is imported: one process, little memory, nothing from the hub.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
