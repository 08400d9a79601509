{{/* The template of the pods that are asked: those of the Deployment, or the heads. */}}

{{- define "pagoda.serverPodTemplate" -}}
metadata:
  labels: {{- merge (include "pagoda.podLabels" . | fromYaml) .Values.podLabels | toYaml | nindent 4 }}
  annotations:
    # Settings are read at start: a change of the file is a new pod.
    checksum/config: {{ include "pagoda.configFile" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "pagoda.podSpec" (list .) | nindent 2 }}
  containers:
    - name: pagoda
      image: {{ include "pagoda.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: {{- concat (list "serve" "--config" "/etc/pagoda/pagoda.json") .Values.extraArgs | toYaml | nindent 8 }}
      env: {{- include "pagoda.serverEnvironment" . | nindent 8 }}
      {{- with .Values.extraEnvFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: http1
          containerPort: {{ int .Values.network.httpPort }}
        - name: h2c
          containerPort: {{ int .Values.network.grpcPort }}
        {{- if eq .Values.mode "multiNode" }}
        - name: ray
          containerPort: 6379
        {{- end }}
      {{- include "pagoda.probes" . | nindent 6 }}
      {{- $wait := dict "preStop" (dict "exec" (dict "command" (list "sleep" (.Values.rollout.preStopSeconds | int | toString)))) }}
      lifecycle: {{- merge (pick .Values.lifecycle "postStart" "stopSignal") (ternary (pick .Values.lifecycle "preStop") $wait (hasKey .Values.lifecycle "preStop")) | toYaml | nindent 8 }}
      resources: {{- include "pagoda.resources" . | nindent 8 }}
      securityContext: {{- include "pagoda.rankSecurityContext" . | nindent 8 }}
      volumeMounts: {{- include "pagoda.serverVolumeMounts" . | nindent 8 }}
    {{- if .Values.extraContainers }}
    {{- include "pagoda.lockedDown" (list . .Values.extraContainers) | nindent 4 }}
    {{- end }}
{{- end -}}
