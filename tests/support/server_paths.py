"""The paths of a vLLM server."""

from __future__ import annotations

# every route of vLLM 0.32's server in development mode, and paths that resemble the open one
SERVER_PATHS = (
    *("/load", "/version", "/kv_event_sources", "/metrics", "/tokenize", "/detokenize", "/v1/models"),
    *("/v1/systemone", "/ping", "/invocations", "/reset_prefix_cache", "/reset_mm_cache"),
    *("/reset_encoder_cache", "/collective_rpc", "/server_info", "/sleep", "/release_kv_cache_memory"),
    *("/wake_up", "/is_sleeping", "/pause", "/resume", "/abort_requests", "/is_paused"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
    *("/weight_info", "/weight_checker", "/get_world_size", "/v1/chat/completions"),
    *("/v1/chat/completions/batch", "/v1/responses", "/v1/responses/x", "/v1/responses/x/cancel"),
    *("/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/generative_scoring"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/generate"),
    *("/inference/v1/abort_requests", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/docs"),
    *("/openapi.json", "/", "/health/", "//health", "/HEALTH", "/health/x", "/x/health", "/health%2fx"),
)
