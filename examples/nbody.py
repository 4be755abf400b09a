"""The sun and the four giant planets, many times over: where do small pushes lead?

    python examples/nbody.py             prints Jupiter comes nearest, to 5.204174, in system 99

Each index starts the same system with Jupiter's speed changed a little, computes 1000 steps of
3.65 days and returns the energy error and Jupiter's distance from the sun. A kernel's arrays are
local; energies and positions come back as tuples.
"""

from __future__ import annotations

import math

import manifold

BODIES = 5
STEPS = 1000
DT = 0.01
YEAR = 365.24
SOLAR_MASS = 4 * math.pi * math.pi


@manifold.kernel
def nbody(index: int, steps: int) -> tuple[float, float]:
    x = [0.0, 4.84143144246472090, 8.34336671824457987, 12.8943695621391310, 15.3796971148509165]
    y = [0.0, -1.16032004402742839, 4.12479856412430479, -15.1111514016986312, -25.9193146099879641]
    z = [0.0, -0.103622044471123109, -0.403523417114321381, -0.223307578892655734,
         0.179258772950371181]  # fmt: skip
    vx = [0.0, 0.00166007664274403694 * YEAR, -0.00276742510726411899 * YEAR,
          0.00296460137564761618 * YEAR, 0.00268067772490389322 * YEAR]  # fmt: skip
    vy = [0.0, 0.00769901118419740425 * YEAR, 0.00499852801234917238 * YEAR,
          0.00237847173959480950 * YEAR, 0.00162824170038242295 * YEAR]  # fmt: skip
    vz = [0.0, -0.0000690460016972063023 * YEAR, 0.0000230417297573763929 * YEAR,
          -0.0000296589568540237556 * YEAR, -0.0000951592254519715870 * YEAR]  # fmt: skip
    mass = [SOLAR_MASS, 0.000954791938424326609 * SOLAR_MASS,
            0.000285885980666130812 * SOLAR_MASS, 0.0000436624404335156298 * SOLAR_MASS,
            0.0000515138902046611451 * SOLAR_MASS]  # fmt: skip
    vx[1] += index * 1e-6
    for i in range(1, BODIES):  # the sun moves so that the whole stands still
        vx[0] -= vx[i] * mass[i] / SOLAR_MASS
        vy[0] -= vy[i] * mass[i] / SOLAR_MASS
        vz[0] -= vz[i] * mass[i] / SOLAR_MASS
    before = 0.0
    after = 0.0
    for step in range(steps + 1):
        if step == 0 or step == steps:
            energy = 0.0
            for i in range(BODIES):
                energy += 0.5 * mass[i] * (vx[i] * vx[i] + vy[i] * vy[i] + vz[i] * vz[i])
                for j in range(i + 1, BODIES):
                    dx, dy, dz = x[i] - x[j], y[i] - y[j], z[i] - z[j]
                    energy -= mass[i] * mass[j] / math.sqrt(dx * dx + dy * dy + dz * dz)
            if step == 0:
                before = energy
            after = energy
        if step == steps:
            break
        for i in range(BODIES):
            for j in range(i + 1, BODIES):
                dx, dy, dz = x[i] - x[j], y[i] - y[j], z[i] - z[j]
                square = dx * dx + dy * dy + dz * dz
                pull = DT / (square * math.sqrt(square))
                vx[i] -= dx * mass[j] * pull
                vy[i] -= dy * mass[j] * pull
                vz[i] -= dz * mass[j] * pull
                vx[j] += dx * mass[i] * pull
                vy[j] += dy * mass[i] * pull
                vz[j] += dz * mass[i] * pull
        for i in range(BODIES):
            x[i] += DT * vx[i]
            y[i] += DT * vy[i]
            z[i] += DT * vz[i]
    dx, dy, dz = x[1] - x[0], y[1] - y[0], z[1] - z[0]
    return (after - before) / before, math.sqrt(dx * dx + dy * dy + dz * dz)


def main() -> None:
    with manifold.connect(up=4) as m:
        found = m.parallel_for(nbody, 0, 100, arguments=(STEPS,))
    worst = max(abs(error) for error, _ in found)
    nearest = min(range(len(found)), key=lambda index: found[index][1])
    print(f"100 systems, {STEPS} steps each; the energy drifts by at most {worst:.2e}")
    print(f"Jupiter comes nearest, to {found[nearest][1]:.6f}, in system {nearest}")


if __name__ == "__main__":
    main()
