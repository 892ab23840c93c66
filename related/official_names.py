"""The names of the weights of DiT, DiCo and DiMR in their authors' code, for official.py.

Each table turns our names into the authors'. Its keys are regular expressions in a name of ours.
They are replaced one after the other, in this order.
"""

DIT_NAMES = {
    r"^patchify": "x_embedder.proj",
    r"mlp\.0": "mlp.fc1",
    r"mlp\.2": "mlp.fc2",
    r"attention": "attn",
    r"^modulation": "final_layer.modulation",
    r"modulation": "adaLN_modulation.1",
    r"^head": "final_layer.linear",
    r"^condition\.dense1": "t_embedder.mlp.0",
    r"^condition\.dense2": "t_embedder.mlp.2",
    r"^condition\.label": "y_embedder.embedding_table",
}

DICO_NAMES = {
    # The layers of a block. conv1 and conv3 have the same names.
    r"depthwise": "conv2",
    r"mlp1": "conv4",
    r"mlp2": "conv5",
    r"attention": "ca.1",
    r"^modulation": "final_layer.modulation",
    r"modulation": "adaLN_modulation.1",
    # The levels, and what is between them.
    r"^down(\d)": r"encoder_level_\1",
    r"^middle": "latent",
    r"^up(\d)": r"decoder_level_\1",
    r"^shrink1": "down1_2.body.0",
    r"^shrink2": "down2_3.body.0",
    r"^grow2": "up3_2.body.0",
    r"^grow1": "up2_1.body.0",
    r"^join(\d)": r"reduce_chan_level\1",
    r"^stem": "x_embedder.proj",
    r"^head": "final_layer.out_proj",
    # The authors number the embeddings of the time from 1, and those of the label from 0.
    r"^conditions\.(\d)\.label": r"y_embedder.embedding_table_\1",
    r"^conditions\.0": "t_embedder_1",
    r"^conditions\.1": "t_embedder_2",
    r"^conditions\.2": "t_embedder_3",
    r"dense1": "mlp.0",
    r"dense2": "mlp.2",
}

DIMR_NAMES = {
    # The parts of a block.
    r"attention\.norm\.gain": "block1.norm.scale",
    r"attention\.qkv": "block1.query_key_value",
    r"attention\.out": "block1.dense",
    r"conv\.": "block1.1.",
    r"mlp\.norm\.gain": "block2.norm.scale",
    r"mlp": "block2",
    # The parts of a branch. Its norms have a gain and a bias that depend on time.
    r"patchify": "input_layer.1",
    r"position": "input_layer.3.position_embeddings.weight",
    r"label": "class_embeds",
    r"expand\.": "upsample.1.kernel.",
    r"norm_below": "upsample.0",
    r"norm_expanded": "upsample.2",
    r"^(branches\.\d)\.norm": r"\1.output_layer.0",
    r"gain": "weight",
    r"head": "output_layer.2",
    r"merge": "skip_denses",
    r"first": "blocks",
    r"^branches": "stages",
    # The numbers of a dimr.TimeParameter.
    r"\.p(\d)$": r".param\1",
    r"\.w$": ".nodecay_weight",
    r"\.b$": ".nodecay_bias",
}


def block_numbers(net):
    """Return more names for a dimr.DiMR, to be replaced before those of DIMR_NAMES.

    The authors number all blocks of a branch, we number the two halves.
    """
    names = {}
    for i, branch in enumerate(net.branches):
        half = len(branch.first)
        names[rf"^branches\.{i}\.middle"] = f"branches.{i}.first.{half}"
        for k in range(half):
            names[rf"^branches\.{i}\.second\.{k}\."] = f"branches.{i}.first.{half + 1 + k}."
    return names
