"""Makes the patch layer importable in a checkout that nobody installed."""

from megatron_moetion import patch_location

patch_location.load_patches("activation")
