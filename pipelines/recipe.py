"""The recipe of a build: from a caption corpus to a reference collection, step by step.

    captions -> prompts -> images -> references -> collection

Every step has a folder in the output and carries on where it was stopped. The folders hold a
fingerprint of all settings that affect their bytes, chained from step to step, and refuse others.
"""

