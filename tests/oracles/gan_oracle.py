"""A GAN's training in plain torch: modules, torch.optim.Adam and autograd, written from the equations of FedGAN's page.

sp(u) = log(1 + e^u); L_D = mean sp(-D(x)) + mean sp(D(G(z))) with G held fixed; L_G = mean sp(-D(G(z'))) with D held fixed.
"""

import torch
from torch import nn


def sp(u):
    return torch.log1p(torch.exp(-u.abs())) + u.clamp(min=0)


def dcgan(width, latent, size, classes=0):
    """The two networks of one-channel images as lists of layers, from the tables of layers."""
    first = size // 4
    generator = nn.Sequential(
        nn.ConvTranspose2d(latent * (2 if classes else 1), 2 * width, first, 1, 0, bias=False),
        nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(2 if classes else 1, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, first, 1, 0, bias=False),
    )  # fmt: skip
    tables = nn.ModuleList([nn.Embedding(classes, latent), nn.Embedding(classes, size * size)] if classes else [])
    return generator, discriminator, tables


class Pair:
    """Both networks with their embeddings, as one trains them by hand."""

    def __init__(self, width, latent, size, classes=0, lr=2e-4, beta1=0.5, eps=1e-8):
        self.g, self.d, self.tables = dcgan(width, latent, size, classes)
        for module in (self.g, self.d, self.tables):
            module.double().train()
        mine = [[*self.g.parameters()], [*self.d.parameters()]]
        for own, table in zip(mine, self.tables, strict=False):
            own.extend(table.parameters())
        self.adam_g, self.adam_d = (torch.optim.Adam(p, lr, (beta1, 0.999), eps) for p in mine)

    def load(self, params, buffers):
        """Takes the values of fedtail's networks by their names."""
        values = {**params, **buffers}

        def of(prefix):
            return {k.removeprefix(prefix): v.clone() for k, v in values.items() if k.startswith(prefix)}

        self.g.load_state_dict(of("generator.layers."))
        self.d.load_state_dict(of("discriminator.layers."))
        for table, part in zip(self.tables, ("generator", "discriminator"), strict=False):
            table.load_state_dict(of(f"{part}.embedding."))

    def values(self):
        """The values of both networks by fedtail's names."""
        found = {f"generator.layers.{k}": v for k, v in self.g.state_dict().items()}
        found |= {f"discriminator.layers.{k}": v for k, v in self.d.state_dict().items()}
        for table, part in zip(self.tables, ("generator", "discriminator"), strict=False):
            found[f"{part}.embedding.weight"] = table.weight.detach()
        return found

    def make(self, z, y):
        if self.tables:
            z = torch.cat([z, self.tables[0](y)], 1)
        return self.g(z.reshape(*z.shape, 1, 1))

    def judge(self, x, y):
        if self.tables:
            x = torch.cat([x, self.tables[1](y).reshape(len(y), 1, *x.shape[2:])], 1)
        return self.d(x).flatten()

    def step(self, x, y, z_d, z_g):
        """One step of D, then one of G; returns both losses."""
        loss_d = sp(-self.judge(x, y)).mean() + sp(self.judge(self.make(z_d, y).detach(), y)).mean()
        self.adam_d.zero_grad()
        loss_d.backward()
        self.adam_d.step()
        loss_g = sp(-self.judge(self.make(z_g, y), y)).mean()
        self.adam_g.zero_grad()
        loss_g.backward()
        self.adam_g.step()
        return loss_d.item(), loss_g.item()
