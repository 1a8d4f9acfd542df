"""A simulated arm that behaves as one on a table: a process of its own, real time, a socket, and faults on demand.

    python arm_controller.py 7080        # then: o2o ... --env arm_robot:TableArm-v0

Three joints turn in a plane; MuJoCo moves them as fast as the clock on the wall. Messages are lines of JSON. Every
10 ms it sends a frame, {"time": s, "ready": bool, "joints": [3] rad, "speeds": [3] rad/s}. It takes

    {"speeds": [3]}                      move so until the next command; after 0.1 s without one the arm holds still
    {"hold": true}, {"home": true}       hold still; go to where episodes begin, "ready" when there
    {"fault": "late", "value": 0.2}      misbehave from now on, see `FAULTS`; null ends it
    {"report": true}                     answer with a line that says what the arm has done since the fault

The arm holds still, too, when its client goes. A controller must do that: a watchdog in the client dies with it.
"""

import collections
import json
import os
import select
import socket
import sys
import time

import mujoco
import numpy as np

FRAME_S, PATIENCE_S, HOME, NOISE = 0.01, 0.1, np.array([0.6, -0.9, 0.6]), 1e-4
FAULTS = {
    "late": "frames arrive this many seconds late",
    "drop": "this share of the frames is lost",
    "hang": "the sensor repeats its last values; frames and their times go on",
    "nan": "the sensor gives NaN",
    "mute": "the cable is out: nothing is sent or heard, the connection stays open",
    "die": "the process ends at once",
}
BODY, SERVO = "", ""
for name, length, at in (("c", 0.15, 0.2), ("b", 0.2, 0.25), ("a", 0.25, 0.0)):
    joint = f'<joint name="{name}" axis="0 0 1" damping="0.5" armature="0.02"/>'
    geom = f'<geom type="capsule" size="0.02" fromto="0 0 0 {length} 0 0" contype="0" conaffinity="0"/>'
    BODY, SERVO = f'<body pos="{at} 0 0">{joint}{geom}{BODY}</body>', f'<velocity joint="{name}" kv="5"/>{SERVO}'
MODEL = f"""
<mujoco>
  <option timestep="0.002" gravity="0 0 0" integrator="implicitfast"/>
  <worldbody>{BODY}</worldbody>
  <actuator>{SERVO}</actuator>
</mujoco>
"""


class Controller:
    """The arm, whom it listens to, and what is wrong with it."""

    def __init__(self):
        """Make the model; the arm stands at home."""
        self.model = mujoco.MjModel.from_xml_string(MODEL)
        self.data, self.rng = mujoco.MjData(self.model), np.random.default_rng()
        self.data.qpos[:] = HOME
        self.began = self.heard_at = time.time()
        self.speeds, self.homing = np.zeros(3), False
        self.fault, self.value, self.frozen = None, 0.0, None
        self.report = {}
        self.waiting = collections.deque()  # of (when to send it, frame)

    def hold(self, why):
        """Hold still; the first reason after a fault is reported."""
        if "since" in self.report and "why" not in self.report:
            self.report |= {"why": why, "still_after_s": time.time() - self.report["since"]}
        self.speeds, self.homing = np.zeros(3), False

    def take(self, message):
        """Do what a message says; return an answer, or None."""
        if "fault" in message:
            self.fault, self.value = message["fault"], message.get("value", 0.0)
            self.frozen, self.report = self.sensed(), {"since": time.time(), "fault": self.fault, "commands": 0}
            if self.fault == "die":
                os._exit(1)
        elif "report" in message:
            return self.report
        elif self.fault != "mute":
            self.heard_at = time.time()
            if "speeds" in message:
                self.speeds, self.homing = np.asarray(message["speeds"], float), False
                self.report["commands"] = self.report.get("commands", 0) + 1
            elif "home" in message:
                self.speeds, self.homing = np.zeros(3), True
            else:
                self.hold("told to")
        return None

    def advance(self):
        """Move up to now."""
        now = time.time()
        if self.speeds.any() and now - self.heard_at > PATIENCE_S:
            self.hold("no command came")
        while self.data.time < now - self.began:
            away = HOME - self.data.qpos
            self.data.ctrl[:] = np.clip(8 * away, -3, 3) if self.homing else self.speeds
            mujoco.mj_step(self.model, self.data)
            self.homing = self.homing and np.abs(away).max() > 0.01

    def sensed(self):
        """Return joints and speeds as the encoders give them."""
        values = np.concatenate([self.data.qpos, self.data.qvel]) + NOISE * self.rng.standard_normal(6)
        return values if self.fault != "nan" else np.full(6, np.nan)

    def sense(self):
        """Make a frame, if it is not lost."""
        if self.fault == "mute" or (self.fault == "drop" and self.rng.random() < self.value):
            return
        now, values = time.time(), (self.frozen if self.fault == "hang" else self.sensed()).tolist()
        frame = {"time": now, "ready": not self.homing, "joints": values[:3], "speeds": values[3:]}
        self.waiting.append((now + (self.value if self.fault == "late" else 0.0), frame))

    def arrived(self):
        """Return the frames whose time has come."""
        frames = []
        while self.waiting and self.waiting[0][0] <= time.time():
            frames.append(self.waiting.popleft()[1])
        return frames


class Client:
    """Who has connected."""

    def __init__(self, listening):
        """Take the next connection."""
        self.socket, _ = listening.accept()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest, self.moves, self.gone = b"", False, False

    def hear(self, arm):
        """Let the arm do what was sent."""
        try:
            new = self.socket.recv(65536)
        except OSError:
            new = b""
        *lines, self.rest = (self.rest + new).split(b"\n")
        for message in map(json.loads, lines):
            self.moves |= not {"fault", "report"} & set(message)
            if (answer := arm.take(message)) is not None:
                self.tell(answer)
        if not new:
            self.gone = True
            if self.moves:
                arm.hold("its client went")

    def tell(self, message):
        """Send a message; one who does not take it has gone."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.gone = True

    def fileno(self):
        """Return what `select` waits for."""
        return self.socket.fileno()


def serve(port):
    """Answer clients until the process is ended."""
    arm, clients, due = Controller(), [], time.time()
    listening = socket.create_server(("127.0.0.1", port))
    while True:
        readable, _, _ = select.select([listening, *clients], [], [], 0.002)
        arm.advance()
        for client in readable:
            if client is listening:
                clients.append(Client(listening))
            else:
                client.hear(arm)
        if (now := time.time()) >= due:
            due = max(due + FRAME_S, now)
            arm.sense()
        for frame in arm.arrived():
            for client in clients:
                if client.moves:
                    client.tell(frame)
        for client in [client for client in clients if client.gone]:
            clients.remove(client)
            client.socket.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
