"""What a recipe will need, before GPUs are rented: memory, steps, tokens, floating-point operations and hours.

``storageless`` runs a model that holds no numbers, ``cost`` measures its layers in that way, ``workload`` says what the
data asks for, ``memory`` what each way of launching holds, ``plan`` puts them together and ``table`` shows it.
"""
