# Licensed under the Apache License, Version 2.0
"""Training that wins back what pruning lost: LoRA, with or without the unpruned model as a teacher."""
