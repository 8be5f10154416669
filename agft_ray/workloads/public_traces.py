"""The public traces that `agft-ray fetch-data` gets: where they are and what their bytes are."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
_AZURE_2023 = (
    "https://raw.githubusercontent.com/Azure/AzurePublicDataset/"
    "790921015d50dd6aae7f7e47f39ba0e235ad6b08/data/AzureLLMInferenceTrace_"
)
_AZURE_2024 = (
    "https://azurepublicdatasettraces.blob.core.windows.net/"
    "azurellminfererencetrace/AzureLLMInferenceTrace_"  # "infererence" is how it is spelt there
)
_MOONCAKE = (
    "https://raw.githubusercontent.com/kvcache-ai/Mooncake/"
    "b82b9f86ceb67bb809339b9088085f34329683bb/FAST25-release/traces/"
)


@dataclass(frozen=True, slots=True)
class PublicTrace:
    """A file to fetch; its name here is its name in `$AGFT_RAY_DATA/traces` too."""

    name: str
    url: str
    what: str
    licence: str
    max_bytes: int
    """More is refused: the file is not that one, or something is wrong."""
    sha256: str | None = None
    """None: no checksum is known here, so what is fetched cannot be verified."""


# The first checksum was computed from a copy of the file; the other four are those that several
# independent projects publish for these files, as they do for the first.
PUBLIC_TRACES = (
    PublicTrace(
        "azure2023_conv.csv",
        f"{_AZURE_2023}conv.csv",
        "Azure 2023, conversation, one hour",
        "CC-BY 4.0",
        4 * MIB,
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
    ),
    PublicTrace(
        "azure2023_code.csv",
        f"{_AZURE_2023}code.csv",
        "Azure 2023, code completion, one hour",
        "CC-BY 4.0",
        4 * MIB,
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
    ),
    PublicTrace(
        "mooncake_conversation.jsonl",
        f"{_MOONCAKE}conversation_trace.jsonl",
        "Mooncake (FAST'25), conversation, one hour",
        "Apache-2.0",
        32 * MIB,
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
    ),
    PublicTrace(
        "mooncake_toolagent.jsonl",
        f"{_MOONCAKE}toolagent_trace.jsonl",
        "Mooncake (FAST'25), tools and agents, one hour",
        "Apache-2.0",
        32 * MIB,
        "48a2db1a13d3bc05e6330140c64f604ba366df20d3c9e128b5c35a01c1fa5f71",
    ),
    PublicTrace(
        "mooncake_synthetic.jsonl",
        f"{_MOONCAKE}synthetic_trace.jsonl",
        "Mooncake (FAST'25), synthetic",
        "Apache-2.0",
        32 * MIB,
        "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
    ),
    PublicTrace(
        "azure2024_conv_week.csv",
        f"{_AZURE_2024}conv_1week.csv",
        "Azure 2024, conversation, one week",
        "CC-BY 4.0",
        2048 * MIB,
    ),
    PublicTrace(
        "azure2024_code_week.csv",
        f"{_AZURE_2024}code_1week.csv",
        "Azure 2024, code completion, one week",
        "CC-BY 4.0",
        2048 * MIB,
    ),
)
