"""Fused functions of a router, which are used only where moe_router_fusion is on."""

fused_topk_with_score_function = None
fused_compute_score_for_moe_aux_loss = None
fused_moe_aux_loss = None
