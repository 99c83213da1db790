"""Operators `torch.ops.qmir.*`: schema, reference, shapes, backward. No kernels here."""

import qmir_ao.ops.chain_quantize
import qmir_ao.ops.conv2d
import qmir_ao.ops.dls
import qmir_ao.ops.dls_fake_quant
import qmir_ao.ops.linear
import qmir_ao.ops.pack
import qmir_ao.ops.rfa
import qmir_ao.ops.rfa_fake_quant
import qmir_ao.ops.selective_scan
import qmir_ao.ops.selective_scan_q
import qmir_ao.ops.ss2d_scan
import qmir_ao.ops.ss2d_scan_q
import qmir_ao.ops.static  # noqa: F401
