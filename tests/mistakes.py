"""Mistakes in the algebra that somebody has made, or could make: the table of mutants."""

from __future__ import annotations

from mutating import Mutant

COMPOSE, COMBINE, KERNEL, AFFINE = "algebra.compose", "algebra.combine", "algebra.kernel", "algebra.affine"
PRODUCT = "algebra.product"
MUTANTS = [
    # Series
    Mutant(
        "drops the first layer's bias",
        f"{COMPOSE}:_bias",
        "return bias_after(",
        "return second.bias if first.bias is not None else bias_after(",
    ),
    Mutant("counts the first layer's bias twice", f"{COMPOSE}:_bias", "(first.bias,", "(2 * first.bias,"),
    Mutant("forgets the second layer's bias", f"{COMPOSE}:_bias", "second.bias, second.groups", "None, second.groups"),
    Mutant("sees the first layer's bias at one tap", "algebra.bias:over_taps", ".sum(2)", ".mean(2)"),
    Mutant(
        "gives the bias of one group to another",
        "algebra.bias:bias_after",
        "first.reshape(groups, -1, 1)",
        "first.reshape(groups, -1, 1).flip(0)",
    ),
    Mutant("has the stride of the second layer", f"{COMPOSE}:compose", "tuple(a * b for a, b", "tuple(b for a, b"),
    Mutant("has the stride of the first layer", f"{COMPOSE}:compose", "tuple(a * b for a, b", "tuple(a for a, b"),
    Mutant(
        "adds paddings without the stride",
        f"{COMPOSE}:compose",
        "(a[0] + s * b[0], a[1] + s * b[1])",
        "(a[0] + b[0], a[1] + b[1])",
    ),
    Mutant("forgets the second layer's padding", f"{COMPOSE}:compose", "(a[0] + s * b[0], a[1] + s * b[1])", "a"),
    Mutant(
        "swaps before and after",
        f"{COMPOSE}:compose",
        "(a[0] + s * b[0], a[1] + s * b[1])",
        "(a[1] + s * b[1], a[0] + s * b[0])",
    ),
    Mutant(
        "ignores the second layer's dilation",
        f"{PRODUCT}:Spread.of",
        "b * a // s if k > 1",
        "a // s if k > 1",
    ),
    Mutant(
        "ignores the first layer's dilation",
        f"{PRODUCT}:Spread.of",
        "[a // s if k > 1 else 1",
        "[1 if k > 1 else 1",
    ),
    Mutant(
        "spreads the taps without the stride",
        f"{PRODUCT}:Spread.of",
        "b * a // s if k > 1",
        "max(b // s, 1) if k > 1",
    ),
    Mutant("has the first layer's dilation", f"{PRODUCT}:tap_spacing", "gcd(*spacings)", "spacings[0]"),
    Mutant(
        "forgets the stride in the dilation",
        f"{PRODUCT}:tap_spacing",
        "first.stride[axis] * second.dilation[axis]",
        "second.dilation[axis]",
    ),
    Mutant("flips the kernel", f"{PRODUCT}:Spread.weight", "(second, self.second)", "(second.flip(-1), self.second)"),
    Mutant(
        "mixes the groups of a spread kernel",
        f"{PRODUCT}:Spread._turned",
        "blocks.transpose(0, 1)",
        "blocks.transpose(0, 1).flip(0)",
    ),
    Mutant(
        "transposes the taps of a pointwise chain",
        f"{PRODUCT}:PointwiseFirst.weight",
        "turned=0).reshape(",
        "turned=0).flip(-1).reshape(",
    ),
    Mutant("multiplies outer products by the wrong row", f"{PRODUCT}:_matmul", "return a * b", "return a * b.flip(0)"),
    Mutant(
        "drops the scale of a depthwise layer",
        f"{PRODUCT}:Scaled.weight",
        "* second.reshape(self.right)",
        "+ 0 * second.reshape(self.right)",
    ),
    Mutant(
        "scales the wrong axis",
        f"{PRODUCT}:Scaled.weight",
        "(first.reshape(self.left)",
        "(first.flip(0).reshape(self.left)",
    ),
    Mutant(
        "has the gradient of another group",
        f"{PRODUCT}:PointwiseLast.pull",
        "before.reshape(self.first)",
        "before.flip(-2).reshape(self.first)",
    ),
    Mutant(
        "forgets the bias in the gradient of a weight",
        "algebra.composition:_at_each_tap",
        "after.add_(spread)",
        "after",
    ),
    Mutant(
        "drops the gradient of a bias in the middle",
        "algebra.composition:Composition.pulled",
        "fallen[second] = _sum(fallen[second], gradient)",
        "fallen[second] = fallen[second]",
    ),
    Mutant("pads behind a bias", f"{COMPOSE}:padding_refusal", "if first.bias is not None:", "if False:"),
    Mutant(
        "asks for padding that is one too small",
        f"{COMPOSE}:padding_refusal",
        "found < least:",
        "found < least - 1:",
    ),
    Mutant(
        "looks at the padding after alone",
        f"{COMPOSE}:padding_refusal",
        '(("before", needed), ("after"',
        '(("after", needed), ("after"',
    ),
    Mutant(
        "rounds a scale without its shift",
        f"{COMPOSE}:compose_rounded",
        "first.bias.detach().double() * factors",
        "first.bias.detach().double()",
    ),
    Mutant(
        "forgets the weight of a scale", f"{COMPOSE}:compose_rounded", ".mul_(factor)", ".mul_(scales[: len(part)])"
    ),
    Mutant(
        "composes in the wrong order",
        "algebra.order:compose_in",
        "return compose(first, second)",
        "return compose(second, first)",
    ),
    # Parallel
    Mutant(
        "centres kernels by k // 2",
        f"{COMBINE}:_on_grid",
        "(padding[axis][0] - kernel.padding[axis][0]) // step",
        "size[axis] // 2 - count // 2",
    ),
    Mutant(
        "aligns kernels by their first taps",
        f"{COMBINE}:_on_grid",
        "(padding[axis][0] - kernel.padding[axis][0]) // step",
        "0",
    ),
    Mutant(
        "ignores the dilation of a branch",
        f"{COMBINE}:_on_grid",
        "kernel.dilation[axis] // step * torch",
        "torch",
    ),
    Mutant(
        "forgets the offsets in the gcd of the grid",
        f"{COMBINE}:_common_grid",
        "gcd(*starts, *spacings)",
        "gcd(*spacings)",
    ),
    Mutant("keeps one of two biases", f"{COMBINE}:_sum_of_biases", "return a + b", "return a"),
    Mutant(
        "adds branches of different strides",
        f"{COMBINE}:_different_outputs",
        "if a.stride != b.stride:",
        "if False:",
    ),
    Mutant(
        "adds branches of different sizes",
        f"{COMBINE}:_different_outputs",
        "if extents[0] != extents[1]:",
        "if False:",
    ),
    Mutant(
        "concatenates the other way round",
        f"{COMBINE}:concatenate",
        "for kernel in (a, b)])",
        "for kernel in (b, a)])",
    ),
    Mutant("concatenates without a bias", f"{COMBINE}:concatenate", "bias = torch.cat(held)", "bias = None"),
    Mutant("scales a weight without its bias", f"{COMBINE}:scaled", "kernel.bias * factor", "kernel.bias"),
    # Groups, padding, layers
    Mutant("lets groups see each other", f"{KERNEL}:with_groups", "torch.eye(fold,", "torch.ones(fold, fold,"),
    Mutant(
        "forgets the gcd of groups in a sum",
        f"{COMBINE}:add",
        "gcd(a.groups, b.groups)",
        "max(a.groups, b.groups)",
    ),
    Mutant(
        "forgets the gcd of groups in a series",
        f"{COMPOSE}:compose",
        "groups = gcd(first.groups, second.groups)",
        "groups = max(first.groups, second.groups)",
    ),
    Mutant(
        "pads the first axis as the last",
        f"{KERNEL}:pad_sides",
        "for i in reversed(range(0, len(amounts), 2))",
        "for i in range(0, len(amounts), 2)",
    ),
    Mutant(
        "takes any padding mode in the middle",
        f"{AFFINE}:in_series",
        "if second.border is not None:",
        "if False:",
    ),
    Mutant("forgets the padding mode", f"{AFFINE}:in_series", "Affine(whole, first.border)", "Affine(whole)"),
    Mutant(
        "sees a bias through a transposed convolution",
        f"{AFFINE}:_with_transposed",
        "if other is first and first.kernel.bias is not None:",
        "if False:",
    ),
    Mutant(
        "forgets the epsilon of batch norm",
        "algebra.channelwise:normalizing",
        "(var + eps).rsqrt()",
        "var.rsqrt()",
    ),
    # Factors
    Mutant(
        "leaves hidden biases as they were drawn",
        "algebra.factorize:_embed",
        "torch.zeros_like(kernel.bias)",
        "kernel.bias",
    ),
    Mutant(
        "shifts copies too far",
        "algebra.factorize:_shift_chain",
        "min(2, max(0, s - 2 * (layer - 2)))",
        "min(2, s)",
    ),
    Mutant(
        "forgets to make up for the gains",
        "algebra.factorize:_embed",
        "weights[solved] / made_up",
        "weights[solved]",
    ),
]
